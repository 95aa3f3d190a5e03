"""Captured frames decoded into the crossings and updates of a view.

Shapes: T vectors of all sequences of a frame, concatenated; L vectors of one sequence; D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from isthmus.attacks.view.tap import Exchange
from isthmus.attacks.view.view import Crossing, ObservedUpdate
from isthmus.model.answers import decode_answers, digest
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb


def crossings_of(sender: str, exchanges: Iterable[Exchange]) -> tuple[Crossing, ...]:
    """All sequences that one silo sent to the trunk, in the order in which they were first sent.

    Args:
        sender: the silo's name.

    Raises:
        FrameError: a tensor's bytes do not fit its codec.
    """
    reading = _Reading(sender)
    for exchange in exchanges:
        reading.take(exchange)
    return reading.crossings()


def observed_updates(sender: str, exchanges: Iterable[Exchange]) -> tuple[ObservedUpdate, ...]:
    """The updates that one silo sent to the root, in order.

    Args:
        sender: the silo's name.
    """
    updates = [exchange.request for exchange in exchanges if exchange.kind is pb.Update]
    return tuple(_observed(sender, update) for update in updates)


def matrix_of(matrix: pb.Matrix) -> torch.Tensor:
    """A matrix from a frame, decoded, ``[T, D]`` in fp32."""
    return codec.decode(matrix, rows=matrix.rows, width=matrix.width, codec=matrix.codec)


@dataclass
class _Session:
    """The rows of one inference session so far.

    Attributes:
        rows: hidden states in the trunk's cache, ``[L, D]`` each.
        answers: the trunk's results for them, ``[L, D]`` each.
        forgotten: hidden states that were removed from the cache, in order.
    """

    rows: list[torch.Tensor]
    answers: list[torch.Tensor]
    forgotten: list[list[torch.Tensor]]

    def rewind(self, forget: int, rows: Sequence[int]) -> None:
        """Remove the last ``forget`` positions of every row, then keep these rows in this order; empty: all."""
        if forget:
            for row, removed in zip(self.rows, self.forgotten, strict=True):
                removed.append(row[-forget:])
            self.rows = [row[:-forget] for row in self.rows]
            self.answers = [answer[:-forget] for answer in self.answers]
        if rows:
            self._select(rows)

    def _select(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]
        self.answers = [self.answers[row] for row in rows]
        self.forgotten = [list(self.forgotten[row]) for row in rows]


@dataclass
class _Reading:
    """A reader of one silo's frames, in their order."""

    sender: str
    round: int = 0
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    answered: dict[int, torch.Tensor] = field(default_factory=dict)
    """Answers about kept examples by their digests, from which later ones may be differences."""
    steps: dict[int, list[Crossing]] = field(default_factory=dict)
    sessions: dict[int, _Session] = field(default_factory=dict)
    uncommitted: list[int] = field(default_factory=list)

    def take(self, exchange: Exchange) -> None:
        request = exchange.request
        if isinstance(request, pb.Begin):
            self.round = request.round
        elif isinstance(request, pb.Keep):
            self.kept[request.example] = matrix_of(request.hidden)
        elif isinstance(request, pb.Forward):
            self._forward(request, exchange.response)
        elif isinstance(request, pb.Backward):
            self._backward(request, exchange.response)
        elif isinstance(request, pb.Commit):
            self._commit(request)
        elif isinstance(request, pb.Decode):
            self._decode(request, exchange.response)

    def crossings(self) -> tuple[Crossing, ...]:
        trained = [crossing for step in self.steps.values() for crossing in step]
        return (*trained, *(one for number, session in self.sessions.items() for one in self._ended(number, session)))

    def _forward(self, request: pb.Forward, answer: pb.Hidden | None) -> None:
        if request.examples:
            rows = [self.kept[example] for example in request.examples]
        else:
            rows = sequences_of(request.hidden, request.lengths)
        answers = self._answers(request, answer)
        self.steps[request.step] = [
            Crossing(self.sender, "train" if request.train else "evaluate", request.step, row, back, round=self.round)
            for row, back in zip(rows, answers, strict=True)
        ]
        if request.train:
            self.uncommitted.append(request.step)

    def _answers(self, request: pb.Forward, answer: pb.Hidden | None) -> list[torch.Tensor] | list[None]:
        if answer is None or not request.answered:
            return _split(answer.hidden if answer else None, request.lengths)
        matrix = answer.changes if answer.changed else answer.hidden
        bases = [self.answered.get(named) for named in request.answered]
        rows = decode_answers(answer, list(request.lengths), bases, matrix.codec, matrix.width)
        self.answered |= {digest(row): row.bfloat16() for row in rows}
        return rows

    def _backward(self, request: pb.Backward, answer: pb.Gradient | None) -> None:
        step = self.steps[request.step]
        lengths = [crossing.length for crossing in step]
        gradients = _split(request.gradient, lengths)
        returned = _split(answer.gradient if request.reply and answer else None, lengths)
        self.steps[request.step] = [
            replace(crossing, gradient_LD=gradient, returned_LD=back)
            for crossing, gradient, back in zip(step, gradients, returned, strict=True)
        ]

    def _commit(self, request: pb.Commit) -> None:
        for number in self.uncommitted:
            self.steps[number] = [replace(crossing, weight=request.weight) for crossing in self.steps[number]]
        self.uncommitted = []

    def _decode(self, request: pb.Decode, answer: pb.Hidden | None) -> None:
        if answer is None:
            return  # the trunk has lost the session: the silo sends the same frames again
        new = sequences_of(request.hidden, request.lengths)
        back = sequences_of(answer.hidden, request.lengths)
        if request.step == 0:
            self.sessions[request.session] = _Session(new, back, [[] for _ in new])
            return
        session = self.sessions[request.session]
        session.rewind(request.forget, request.rows)
        session.rows = [torch.cat(pair) for pair in zip(session.rows, new, strict=True)]
        session.answers = [torch.cat(pair) for pair in zip(session.answers, back, strict=True)]

    def _ended(self, number: int, session: _Session) -> list[Crossing]:
        return [
            Crossing(
                self.sender,
                "inference",
                number,
                row,
                answer,
                round=self.round,
                forgotten_LD=torch.cat(removed) if removed else None,
            )
            for row, answer, removed in zip(session.rows, session.answers, session.forgotten, strict=True)
        ]


def _split(matrix: pb.Matrix | None, lengths: Sequence[int]) -> list[torch.Tensor] | list[None]:
    """A matrix split into sequences, ``[L, D]`` each; a None per sequence without a matrix."""
    return [None] * len(lengths) if matrix is None else sequences_of(matrix, lengths)


def sequences_of(matrix: pb.Matrix, lengths: Sequence[int]) -> list[torch.Tensor]:
    """A matrix from a frame split into its sequences, ``[L, D]`` each in fp32."""
    return list(torch.split(matrix_of(matrix), list(lengths)))


def _observed(sender: str, update: pb.Update) -> ObservedUpdate:
    shapes = {tensor.name: tuple(tensor.shape) for tensor in update.tensors}
    return ObservedUpdate(sender, update.round, update.weight, codec.decode_named(update.tensors, shapes))
