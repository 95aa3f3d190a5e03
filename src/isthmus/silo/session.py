"""A session: the silo's handle of one KV cache on the trunk.

Shapes: T tokens of all sequences one after another, W what crosses of each.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from isthmus.errors import UnknownSessionError
from isthmus.privacy.subjects import Subjects
from isthmus.silo.boundary import Boundary
from isthmus.silo.records import History, Records
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Channel

REPLAYS = 16
"""Times that a lost session's frames are sent again for one step."""


class Way(Protocol):
    """What a session needs of its trunk (a ``silo.remote.RemoteTrunk``)."""

    channel: Channel
    boundary: Boundary
    records: Records

    def answer_to(self, h_TW: torch.Tensor) -> torch.Tensor: ...

    def noise_in(self, matrix: pb.Matrix, h_TW: torch.Tensor, subjects: Subjects) -> torch.Tensor | None: ...


class RemoteSession:
    """One KV cache on the trunk. Implements ``model.cache.TrunkSession``.

    Sent frames are kept: a trunk that lost the session gets them again, as they were, with their noise.
    """

    def __init__(self, trunk: Way, id: int) -> None:
        self.id = id
        self._trunk = trunk
        self._channel = trunk.channel
        self._history: History | None = None
        self._sent: list[pb.Decode] = []
        self._forget = 0
        self._rows: list[int] = []

    def step(
        self, h_TW: torch.Tensor, lengths: list[int], rows: list[list[int]] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Append these tokens to the cache and run them; gives the answer, and the noise in it if top asks."""
        number = len(self._sent)
        self._history = self._history or self._trunk.records.history(len(lengths))
        subjects = self._history.subjects(rows, lengths)
        request = pb.Decode(
            session=self.id,
            step=number,
            lengths=lengths,
            hidden=self._trunk.boundary.release(h_TW, "forward", number, subjects),
            forget=self._forget,
            rows=self._rows,
        )
        self._forget, self._rows = 0, []
        self._sent.append(request)
        answered_TD = self._trunk.boundary.admit(self._ask(request).hidden, "forward", self._trunk.answer_to(h_TW))
        return answered_TD, self._trunk.noise_in(request.hidden, h_TW, subjects)

    def hear(self, rows: list[list[int]]) -> list[list[int]] | None:
        """The next step's new tokens, before bottom runs; returns the classes of all rows' tokens, if anyone asks for
        classes."""
        self._history = self._history or self._trunk.records.history(len(rows))
        return self._history.hear(rows)

    def forget(self, positions: int) -> None:
        self._forget += positions
        if self._history is not None:
            self._history.forget(positions)

    def select(self, rows: list[int]) -> None:
        self._rows = [self._rows[row] for row in rows] if self._rows else list(rows)
        if self._history is not None:
            self._history.select(rows)

    def close(self) -> None:
        self._channel.call(pb.Close(session=self.id))

    def _ask(self, request: pb.Decode) -> Any:
        """The answer to the newest frame; a trunk short of memory may take the session away even while it gets it."""
        asked = [request]
        for _ in range(REPLAYS):
            answers = [self._channel.submit(sent) for sent in asked]
            try:
                return [answer.result() for answer in answers][-1]
            except UnknownSessionError as error:
                lost = error
                asked = self._sent
        raise lost
