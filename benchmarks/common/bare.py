"""Silos whose ends are left out: they send made-up hidden states, to measure trunk and wire alone.

Shapes: T tokens of all sequences one after another, D the model's width.
"""

from __future__ import annotations

import torch

from isthmus.model.crossing import Outbound
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import BoundarySection
from isthmus.silo.boundary import Boundary
from isthmus.silo.remote import RemoteTrunk
from isthmus.wire.channel import Channel


class BareSilo:
    """One silo's connection to a trunk, without bottom and top.

    Args:
        width: of the model.
    """

    def __init__(self, channel: Channel, section: BoundarySection, width: int) -> None:
        self.trunk = RemoteTrunk(channel, Boundary(section), width)
        self.rounds = self.trunk.rounds

    def step(self, h_TD: torch.Tensor, lengths: list[int]) -> None:
        """A forward and a backward; the gradient is the answer, made small."""
        pending = self.trunk.send(made_up(h_TD, lengths))
        answer_TD = self.trunk.receive(pending)
        assert answer_TD is not None
        self.trunk.receive(self.trunk.send_gradient(pending, 1e-3 * answer_TD, reply=True))

    def close(self) -> None:
        self.trunk.channel.close()


def made_up(h_TD: torch.Tensor, lengths: list[int]) -> Outbound:
    """These hidden states, as records that nobody knows."""
    records = tuple(f"made-up-{number}" for number in range(len(lengths)))
    return Outbound(lengths, h_TD, Subjects(records, tuple(lengths)))
