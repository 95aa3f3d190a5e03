"""A session: the silo's handle of one KV cache on the trunk.

Shapes: T tokens of all sequences one after another, D the model's width, W the width that crosses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from isthmus.errors import UnknownSessionError
from isthmus.model.crossing import Outbound, Reply
from isthmus.privacy.events import Release
from isthmus.privacy.subjects import Subjects
from isthmus.silo.boundary import Boundary
from isthmus.silo.records import SequenceHistory
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel

MAX_REPLAYS = 16
"""Largest number of times that one step replays a lost session's frames."""


@dataclass(frozen=True)
class SentStep:
    """A step on its way."""

    request: pb.Decode
    answer: Answer
    h_TW: torch.Tensor
    """What was released, before clipping and noise."""
    subjects: Subjects


class RemoteSession:
    """One KV cache on the trunk. Implements ``model.cache.TrunkSession``.

    Sent frames are stored. If the trunk loses the session, they are replayed unchanged, with the same noise.

    Args:
        id: the session's identifier, unique within the silo.
        width: the model's width, D.
        denoise: whether replies contain the noise that the boundary added.
    """

    def __init__(self, channel: Channel, boundary: Boundary, id: int, width: int, *, denoise: bool = False) -> None:
        self.id = id
        self._channel = channel
        self._boundary = boundary
        self._width = width
        self._denoise = denoise
        self._history: SequenceHistory | None = None
        self._sent: list[pb.Decode] = []
        self.releases: list[Release] = []
        """What has left, as the ledger has it."""
        self._cropped = 0
        self._rows: list[int] = []

    def subjects(self, rows: list[list[int]] | None, lengths: list[int]) -> Subjects:
        """The records that the sequences belong to.

        Args:
            rows: the new token ids of each sequence, already given to ``read_tokens`` or not; None for embeddings.
            lengths: number of new positions of each sequence that cross.
        """
        if self._history is None:
            self._history = self._boundary.records.history(len(lengths))
        return self._history.subjects(rows, lengths)

    def step(self, outbound: Outbound) -> Reply:
        """Append the batch's tokens to the trunk's cache and return the trunk's output at them.

        Raises:
            BudgetExhausted: a record's privacy budget, or the silo's, does not allow the release. Nothing leaves.
            UnknownSessionError: the trunk lost the session ``MAX_REPLAYS`` times in this step.
        """
        assert outbound.h_TW is not None
        assert outbound.subjects is not None
        drafted = outbound.cache is not None and outbound.cache.drafted
        return self.receive(self.send(outbound.h_TW, outbound.subjects, outbound.lengths, drafted=drafted))

    def send(self, h_TW: torch.Tensor, subjects: Subjects, lengths: list[int], *, drafted: bool = False) -> SentStep:
        """Send new tokens' hidden states without waiting for the answer.

        Args:
            lengths: number of new positions of each row that cross.
            drafted: whether the tokens are drafts.

        Raises:
            BudgetExhausted: as ``step``.
        """
        hidden, event = self._boundary.noted_release(h_TW, "forward", len(self._sent), subjects)
        self.releases.append(event)
        request = pb.Decode(
            session=self.id,
            step=len(self._sent),
            lengths=lengths,
            hidden=hidden,
            forget=self._cropped,
            rows=self._rows,
            drafted=drafted,
        )
        self._cropped, self._rows = 0, []
        self._sent.append(request)
        return SentStep(request, self._channel.submit(request), h_TW, subjects)

    def receive(self, sent: SentStep) -> Reply:
        """The trunk's answer to the newest step. If the trunk lost the session, all frames are replayed.

        There may be several replays: a trunk short of memory may evict a session while it is replayed.

        Raises:
            UnknownSessionError: as ``step``.
        """
        answers, h_TW = [sent.answer], sent.h_TW
        for _ in range(MAX_REPLAYS):
            try:
                answer: pb.Hidden = [one.result() for one in answers][-1]  # type: ignore[assignment]
                break
            except UnknownSessionError as error:
                lost = error
                answers = [self._channel.submit(request) for request in self._sent]
        else:
            raise lost
        g_TD = self._boundary.decode_reply(answer.hidden, "forward", (len(h_TW), self._width), h_TW)
        noise = self._boundary.added_noise(sent.request.hidden, h_TW, sent.subjects) if self._denoise else None
        return Reply(g_TD, noise)

    def read_tokens(self, rows: list[list[int]]) -> list[list[int]] | None:
        """Note the next step's new tokens before bottom runs.

        Returns:
            The sensitivity classes of each sequence's tokens from its start, or None if the recipe has no classes.
        """
        if self._history is None:
            self._history = self._boundary.records.history(len(rows))
        return self._history.read_tokens(rows)

    def crop(self, positions: int) -> None:
        """Drop this many positions from the end of every row; the trunk does so with the next step."""
        self._cropped += positions
        if self._history is not None:
            self._history.crop(positions)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; the trunk does so with the next step."""
        self._rows = [self._rows[row] for row in rows] if self._rows else list(rows)
        if self._history is not None:
            self._history.select(rows)

    def same_record(self, first: list[int], row: list[int]) -> bool:
        """Whether a whole sequence is of the record of the tokens that it begins with (``Records.same_record``)."""
        return self._boundary.records.same_record(first, row)

    @property
    def sent_tokens(self) -> int:
        """Number of positions in all stored frames, dropped ones included."""
        return sum(sum(request.lengths) for request in self._sent)

    def close(self) -> None:
        """Free the trunk's KV cache."""
        self.abandon().result()

    def abandon(self) -> Answer:
        """Free the trunk's KV cache, without waiting for it."""
        return self._channel.submit(pb.Close(session=self.id))
