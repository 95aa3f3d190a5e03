"""The trunk as the silo's model sees it: a module whose forward and backward cross the wire.

Shapes: T tokens of all sequences one after another, D the model's width, W what crosses of it.
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
from isthmus.model.bottleneck import DOWN, GATE, project, tensor_of
from isthmus.model.cut import Part
from isthmus.privacy.events import Path
from isthmus.privacy.subjects import Subjects
from isthmus.silo.boundary import Boundary
from isthmus.silo.register import History, Register
from isthmus.silo.released import Ending, Released
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


class RemoteTrunk(nn.Module):
    """Implements ``model.split.TrunkModule`` over a channel.

    A training step is: forwards and backwards (as many as gradients are accumulated), then ``commit``.

    Args:
        register: says whom tensors are about.
        ends: bottom and top, for the layers that the recipe may add where they meet the trunk.
        released: of a silo that releases each example once; None: hidden states leave at every forward.
        gradients: whether loss gradients leave. Without them the trunk learns nothing, and hidden states get none.
    """

    def __init__(
        self,
        channel: Channel,
        boundary: Boundary,
        register: Register | None = None,
        *,
        ends: tuple[Part, Part] | None = None,
        released: Released | None = None,
        gradients: bool = True,
    ) -> None:
        super().__init__()
        self.gradients = gradients
        self._ends = ends or ()
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
        h_TW = self.narrow(h_TD, lengths, rows)
        if session is not None:
            return self.join(h_TD, session.step(h_TW, lengths, rows))
        train = torch.is_grad_enabled() and self.gradients

        def start() -> Flight:
            if self.released is not None and rows is not None:
                return self.start_rows(rows, lengths, train=train)
            return self.start_forward(h_TW, lengths, rows, train=train)

        return self.join(h_TD, _cross(h_TW, self, start) if train else self._landed(start()))

    def narrow(self, h_TD: torch.Tensor, lengths: list[int], rows: list[list[int]] | None = None) -> torch.Tensor:
        """What of bottom's result crosses, ``[T, W]``: all of it, or its projection to the recipe's width.

        Where it has a gradient it is clipped here already, so that the gradient knows; the boundary clips everything.
        """
        h_TW = self.projected(h_TD)
        if not (torch.is_grad_enabled() and h_TW.requires_grad):
            return h_TW
        return self.boundary.clipped(h_TW, "forward", self.register.subjects(rows, lengths))

    def projected(self, h_TD: torch.Tensor) -> torch.Tensor:
        """The same, not clipped yet."""
        return project(h_TD, self._layer(0, DOWN))

    def join(self, h_TD: torch.Tensor, g_TD: torch.Tensor) -> torch.Tensor:
        """What top gets for the trunk's answer to ``h_TD``: the answer, or with a residual path their weighted sum."""
        gate_D = self._layer(1, GATE)
        return g_TD if gate_D is None else h_TD + gate_D.to(g_TD.dtype) * g_TD

    def _layer(self, end: int, name: str) -> torch.Tensor | None:
        return tensor_of(self._ends[end], name) if self._ends else None

    @property
    def releases_once(self) -> bool:
        return self.released is not None

    def from_rows(self, rows: list[list[int]], lengths: list[int]) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradients:
            return _cross(None, self, lambda: self.start_rows(rows, lengths))
        return self._landed(self.start_rows(rows, lengths, train=False))

    def affordable(self, rows: list[list[int]], lengths: list[int], *, train: bool = True) -> list[bool]:
        """For each sequence of token ids, whether the privacy budgets bear that its last ``lengths`` tokens cross.

        Args:
            train: in a whole training step, forward and backward, rather than in a forward alone.
        """
        subjects = self.register.subjects(rows, lengths)
        examples = [Ending(tuple(row), length) for row, length in zip(rows, lengths, strict=True)]
        forward = [self.released is None or not self.released.holds(example) for example in examples]
        return self.boundary.affordable(subjects, forward, gradient=train and self.gradients)

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
        session = RemoteSession(self, next(self._sessions))
        weakref.finalize(session, self._abandoned.append, session.id)
        return session

    def start_forward(
        self, h_TW: torch.Tensor, lengths: list[int], rows: list[list[int]] | None = None, *, train: bool = True
    ) -> Flight:
        """Send a training step's hidden states, and do not wait for the answer."""
        step = next(self._steps)
        subjects = self.register.subjects(rows, lengths)
        hidden = self.boundary.release(h_TW, "forward", step, subjects)
        request = pb.Forward(step=step, lengths=lengths, hidden=hidden, train=train)
        return Flight(
            step, self.answer_to(h_TW), "forward", True, self.channel.submit(request), subjects, h_TW.shape[1]
        )

    def start_rows(self, rows: list[list[int]], lengths: list[int], *, train: bool = True) -> Flight:
        """As ``start_forward``, for the last ``lengths`` tokens of these rows of token ids.

        Those never released before run through bottom first.
        """
        assert self.released is not None
        step = next(self._steps)
        subjects = self.register.subjects(rows, lengths)
        examples = [Ending(tuple(row), length) for row, length in zip(rows, lengths, strict=True)]
        keeps = self._keep(self.released.release(examples, step, self.register))
        numbers = [self.released.number(example) for example in examples]
        request = pb.Forward(step=step, lengths=lengths, examples=numbers, train=train)
        like_TW = self.released.like(sum(lengths))
        answer = self.channel.submit(request)
        return Flight(
            step, self.answer_to(like_TW), "forward", True, answer, subjects, like_TW.shape[1], request, keeps
        )

    def start_backward(self, forward: Flight, gradient_TD: torch.Tensor, *, reply: bool) -> Flight:
        """Send the gradient of what a forward gave; ``reply`` if the gradient of what it took is wanted."""
        gradient = self.boundary.release(gradient_TD, "gradient", forward.step, forward.subjects)
        request = pb.Backward(step=forward.step, gradient=gradient, reply=reply)
        like_TW = gradient_TD[:1, :1].expand(len(gradient_TD), forward.width)
        return Flight(
            forward.step, like_TW, "gradient", reply, self.channel.submit(request), forward.subjects, forward.width
        )

    def land(self, flight: Flight) -> torch.Tensor | None:
        """Wait for the answer; None for a backward without reply."""
        if flight.reply:
            return self._landed(flight)
        flight.answer.result()
        return None

    def answer_to(self, h_TW: torch.Tensor) -> torch.Tensor:
        """A tensor in the shape of the trunk's answer, without memory."""
        width = self._ends[0].config.hidden_size if self._ends else h_TW.shape[1]
        return h_TW.detach()[:1, :1].expand(len(h_TW), width)

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

    def __init__(self, trunk: RemoteTrunk, id: int) -> None:
        self.id = id
        self._trunk = trunk
        self._channel = trunk.channel
        self._history: History | None = None
        self._sent: list[pb.Decode] = []
        self._forget = 0
        self._rows: list[int] = []

    def step(self, h_TW: torch.Tensor, lengths: list[int], rows: list[list[int]] | None = None) -> torch.Tensor:
        """Append these tokens to the cache and run them."""
        number = len(self._sent)
        self._history = self._history or self._trunk.register.history(len(lengths))
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
        return self._trunk.boundary.admit(self._ask(request).hidden, "forward", self._trunk.answer_to(h_TW))

    def hear(self, rows: list[list[int]]) -> list[list[int]] | None:
        """The next step's new tokens, before bottom runs; returns the classes of all rows' tokens, if anyone asks for
        classes."""
        self._history = self._history or self._trunk.register.history(len(rows))
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
