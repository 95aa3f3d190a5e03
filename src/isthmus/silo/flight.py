"""A training step's tensor on its way through the trunk."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from isthmus.privacy.events import Path
from isthmus.privacy.subjects import Subjects
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer


@dataclass
class Flight:
    """What is known of it until its answer lands. T tokens, D the model's width, W what crosses of it."""

    step: int
    like_TD: torch.Tensor
    """Anything of the answer's shape, device and dtype."""
    path: Path
    reply: bool
    answer: Answer
    subjects: Subjects
    width: int
    """Of the hidden states that were sent."""
    request: pb.Forward | None = None
    """A forward by numbers: it goes again if the trunk has forgotten one of them."""
    keeps: list[Answer] = field(default_factory=list)
    """Of the examples that were sent for it."""
    noise_TW: torch.Tensor | None = None
    """What the boundary added to the hidden states, where top wants to know."""
