"""The trunk as the silo's model sees it: a module whose forward and backward cross the wire.

Shapes: T tokens of all sequences one after another, D width.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from isthmus.errors import UnknownExampleError, UnknownSessionError
from isthmus.privacy.events import Path
from isthmus.privacy.subjects import Subjects
from isthmus.silo.boundary import Boundary
from isthmus.silo.register import History, Register
from isthmus.silo.released import Released
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel

KEEPS = 64
"""Examples that may be on their way to the trunk at a time."""
REPLAYS = 16
"""Times that a lost session's frames are sent again for one step."""


@dataclass
class Flight:
    """A training step's tensor on its way through the trunk."""

    step: int
    like_TD: torch.Tensor
    """What was sent, or anything else of the answer's shape, device and dtype."""
    path: Path
    reply: bool
    answer: Answer
    subjects: Subjects
    request: pb.Forward | None = None
    """A forward by numbers: it goes again if the trunk has forgotten one of them."""
    keeps: list[Answer] = field(default_factory=list)
    """Of the examples that were sent for it."""


class RemoteTrunk(nn.Module):
    """Implements ``model.split.TrunkModule`` over a channel.

    A training step is: forwards and backwards (as many as gradients are accumulated), then ``commit``.

    Args:
        register: says whom tensors are about.
        released: of a silo that releases each example once; None: hidden states leave at every forward.
    """

    def __init__(
        self,
        channel: Channel,
        boundary: Boundary,
        register: Register | None = None,
        released: Released | None = None,
    ) -> None:
        super().__init__()
        self.channel = channel
        self.boundary = boundary
        self.register = register or Register()
        self.released = released
        self._steps = itertools.count(1)
        self._sessions = itertools.count(1)
        self._abandoned: deque[int] = deque()
        # Autograd calls our backward only if an input requires grad; a frozen bottom gives none, this one always does.
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(
        self,
        h_TD: torch.Tensor,
        lengths: list[int],
        session: RemoteSession | None,
        rows: list[list[int]] | None = None,
    ) -> torch.Tensor:
        if session is not None:
            return session.step(h_TD, lengths, rows)
        if torch.is_grad_enabled():
            return _cross(h_TD, self, lambda: self.start_forward(h_TD, lengths, rows))
        return self._landed(self.start_forward(h_TD, lengths, rows, train=False))

    @property
    def releases_once(self) -> bool:
        return self.released is not None

    def from_rows(self, rows: list[list[int]]) -> torch.Tensor:
        if torch.is_grad_enabled():
            return _cross(None, self, lambda: self.start_rows(rows))
        return self._landed(self.start_rows(rows, train=False))

    def affordable(self, rows: list[list[int]], *, train: bool = True) -> list[bool]:
        """For each sequence of token ids, whether the privacy budgets bear that it takes part.

        Args:
            train: in a whole training step, forward and backward, rather than in a forward alone.
        """
        subjects = self.register.subjects(rows, list(map(len, rows)))
        forward = [self.released is None or not self.released.holds(row) for row in rows]
        return self.boundary.affordable(subjects, forward, gradient=train)

    def begin(self, round: int, participants: list[str]) -> None:
        """Wait until all participants are ready for this round's first step."""
        self.channel.call(pb.Begin(round=round, participants=participants))

    def commit(self, round: int, step: int, weight: float) -> int:
        """Hand in the gradients of this optimizer step and wait until the trunk has stepped.

        Args:
            round, step: which step, both from 1.
            weight: supervised tokens behind the gradients.

        Returns:
            How many silos' gradients the trunk's step was made of.
        """
        stepped: pb.Stepped = self.channel.call(pb.Commit(round=round, step=step, weight=weight))
        return stepped.contributors

    def open_session(self) -> RemoteSession:
        while self._abandoned:
            self.channel.submit(pb.Close(session=self._abandoned.popleft()))
        session = RemoteSession(self.channel, self.boundary, self.register, next(self._sessions))
        weakref.finalize(session, self._abandoned.append, session.id)
        return session

    def start_forward(
        self, h_TD: torch.Tensor, lengths: list[int], rows: list[list[int]] | None = None, *, train: bool = True
    ) -> Flight:
        """Send a training step's hidden states, and do not wait for the answer."""
        step = next(self._steps)
        subjects = self.register.subjects(rows, lengths)
        hidden = self.boundary.release(h_TD, "forward", step, subjects)
        request = pb.Forward(step=step, lengths=lengths, hidden=hidden, train=train)
        return Flight(step, h_TD, "forward", True, self.channel.submit(request), subjects)

    def start_rows(self, rows: list[list[int]], *, train: bool = True) -> Flight:
        """As ``start_forward``, for these rows of token ids. Those never released before run through bottom first."""
        assert self.released is not None
        step = next(self._steps)
        like_TD = self.released.like(sum(map(len, rows)))
        subjects = self.register.subjects(rows, list(map(len, rows)))
        keeps = self._keep(self.released.release(rows, step, self.register))
        examples = [self.released.number(row) for row in rows]
        request = pb.Forward(step=step, lengths=subjects.lengths, examples=examples, train=train)
        return Flight(step, like_TD, "forward", True, self.channel.submit(request), subjects, request, keeps)

    def start_backward(self, forward: Flight, gradient_TD: torch.Tensor, *, reply: bool) -> Flight:
        """Send the gradient of what a forward gave; ``reply`` if the gradient of what it took is wanted."""
        gradient = self.boundary.release(gradient_TD, "gradient", forward.step, forward.subjects)
        request = pb.Backward(step=forward.step, gradient=gradient, reply=reply)
        return Flight(forward.step, gradient_TD, "gradient", reply, self.channel.submit(request), forward.subjects)

    def land(self, flight: Flight) -> torch.Tensor | None:
        """Wait for the answer; None for a backward without reply."""
        if flight.reply:
            return self._landed(flight)
        flight.answer.result()
        return None

    def _landed(self, flight: Flight) -> torch.Tensor:
        body: Any = self._answered(flight)
        matrix = body.hidden if flight.path == "forward" else body.gradient
        return self.boundary.admit(matrix, flight.path, flight.like_TD)

    def _answered(self, flight: Flight) -> Any:
        """The answer; examples that the trunk has forgotten go again first, once, as they went before."""
        try:
            _wait(flight.keeps)
            return flight.answer.result()
        except UnknownExampleError:
            if flight.request is None or self.released is None:
                raise
        request = flight.request
        request.step = flight.step = next(self._steps)  # a later step may be open already
        keeps = self._keep(self.released.again(request.examples))
        answer = self.channel.submit(request)
        _wait(keeps)
        return answer.result()

    def _keep(self, requests: Iterable[pb.Keep]) -> list[Answer]:
        """Send examples, without waiting as long as few are on their way."""
        answers: list[Answer] = []
        for request in requests:
            if len(answers) >= KEEPS:
                answers[-KEEPS].result()
            answers.append(self.channel.submit(request))
        return answers


def _cross(h_TD: torch.Tensor | None, remote: RemoteTrunk, start: Callable[[], Flight]) -> torch.Tensor:
    """The result of the forward that ``start`` sends, differentiable; ``h_TD`` gets the gradient of what was sent."""
    crossed: torch.Tensor = _Crossing.apply(h_TD, remote._anchor, remote, start)  # type: ignore[no-untyped-call]
    return crossed


def _wait(answers: Iterable[Answer]) -> None:
    """Until all are there; raises the first error among them."""
    for answer in answers:
        answer.result()


class _Crossing(torch.autograd.Function):
    """One training step's way through the trunk and back."""

    @staticmethod
    def forward(
        ctx: Any, h_TD: torch.Tensor | None, anchor: torch.Tensor, remote: RemoteTrunk, start: Callable[[], Flight]
    ) -> torch.Tensor:
        ctx.remote = remote
        ctx.flight = start()
        return remote.land(ctx.flight)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, gradient_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flight = ctx.remote.start_backward(ctx.flight, gradient_TD, reply=ctx.needs_input_grad[0])
        return ctx.remote.land(flight), None, None, None


class RemoteSession:
    """One KV cache on the trunk. Implements ``model.cache.TrunkSession``.

    Sent frames are kept: a trunk that lost the session gets them again, as they were, with their noise.
    """

    def __init__(self, channel: Channel, boundary: Boundary, register: Register, id: int) -> None:
        self.id = id
        self._channel = channel
        self._boundary = boundary
        self._register = register
        self._history: History | None = None
        self._sent: list[pb.Decode] = []
        self._forget = 0
        self._rows: list[int] = []

    def step(self, h_TD: torch.Tensor, lengths: list[int], rows: list[list[int]] | None = None) -> torch.Tensor:
        """Append these tokens to the cache and run them."""
        number = len(self._sent)
        self._history = self._history or self._register.history(len(lengths))
        subjects = self._history.subjects(rows, lengths)
        request = pb.Decode(
            session=self.id,
            step=number,
            lengths=lengths,
            hidden=self._boundary.release(h_TD, "forward", number, subjects),
            forget=self._forget,
            rows=self._rows,
        )
        self._forget, self._rows = 0, []
        self._sent.append(request)
        return self._boundary.admit(self._ask(request).hidden, "forward", h_TD)

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
