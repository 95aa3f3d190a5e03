"""A session: the silo's handle of one KV cache on the trunk.

Shapes: T tokens of all sequences one after another, D the model's width, W numbers that cross of it.
"""

from __future__ import annotations

from typing import Any

from isthmus.errors import UnknownSessionError
from isthmus.model.crossing import Outbound
from isthmus.model.split import Reply
from isthmus.privacy.subjects import Subjects
from isthmus.silo.boundary import Boundary
from isthmus.silo.records import History
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Channel

REPLAYS = 16
"""Times that a lost session's frames are sent again for one step."""


class RemoteSession:
    """One KV cache on the trunk. Implements ``model.cache.TrunkSession``.

    Sent frames are kept: a trunk that lost the session gets them again, as they were, with their noise.

    Args:
        id: of the session, among the silo's.
        width: of the model: that of the trunk's answers.
        denoise: whether replies tell the noise that the boundary added.
    """

    def __init__(self, channel: Channel, boundary: Boundary, id: int, width: int, *, denoise: bool = False) -> None:
        self.id = id
        self._channel = channel
        self._boundary = boundary
        self._width = width
        self._denoise = denoise
        self._history: History | None = None
        self._sent: list[pb.Decode] = []
        self._cropped = 0
        self._rows: list[int] = []

    def subjects(self, rows: list[list[int]] | None, lengths: list[int]) -> Subjects:
        """The records of the sequences; their new tokens are read, if ``hear`` has not read them."""
        if self._history is None:
            self._history = self._boundary.records.history(len(lengths))
        return self._history.subjects(rows, lengths)

    def step(self, outbound: Outbound) -> Reply:
        """Append the batch's tokens to the cache and run them."""
        h_TW, subjects, number = outbound.h_TW, outbound.subjects, len(self._sent)
        assert h_TW is not None
        assert subjects is not None
        hidden = self._boundary.release(h_TW, "forward", number, subjects)
        request = pb.Decode(
            session=self.id,
            step=number,
            lengths=outbound.lengths,
            hidden=hidden,
            forget=self._cropped,
            rows=self._rows,
        )
        self._cropped, self._rows = 0, []
        self._sent.append(request)
        shape = (len(h_TW), self._width)
        g_TD = self._boundary.admit(self._ask(request).hidden, "forward", shape, h_TW)
        return Reply(g_TD, self._boundary.noise_in(hidden, h_TW, subjects) if self._denoise else None)

    def hear(self, rows: list[list[int]]) -> list[list[int]] | None:
        """Read the next step's new tokens, before bottom runs; returns the classes of all rows' tokens, or None if the
        recipe has no classes."""
        if self._history is None:
            self._history = self._boundary.records.history(len(rows))
        return self._history.hear(rows)

    def crop(self, positions: int) -> None:
        self._cropped += positions
        if self._history is not None:
            self._history.crop(positions)

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
