"""The trunk as the silo's model sees it: a module whose forward and backward cross the wire.

Shapes: T tokens of all sequences one after another, D the model's width, W what crosses of it.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from isthmus.errors import UnknownExampleError
from isthmus.model.bottleneck import DENOISE, DOWN, GATE, project, tensor_of
from isthmus.model.cut import Part
from isthmus.privacy.subjects import Subjects
from isthmus.silo.boundary import Boundary
from isthmus.silo.flight import Flight
from isthmus.silo.records import Records
from isthmus.silo.released import Ending, Released
from isthmus.silo.session import RemoteSession
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel

KEEPS = 64
"""Examples that may be on their way to the trunk at a time."""


class RemoteTrunk(nn.Module):
    """Implements ``model.split.TrunkModule`` over a channel.

    A training step is: forwards and backwards (as many as gradients are accumulated), then ``commit``.

    Args:
        records: says whom tensors are about.
        ends: bottom and top, for the layers that the recipe may add where they meet the trunk.
        released: of a silo that releases each example once; None: hidden states leave at every forward.
        gradients: whether loss gradients leave. Without them the trunk learns nothing, and hidden states get none.
    """

    def __init__(
        self,
        channel: Channel,
        boundary: Boundary,
        records: Records | None = None,
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
        self.records = records or Records()
        self.released = released
        self._steps = itertools.count(1)
        self._sessions = itertools.count(1)
        self._abandoned: deque[int] = deque()
        self._aside = False
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
            g_TD, noise_TW = session.step(h_TW, lengths, rows)
            return self.join(h_TD, g_TD, noise_TW)
        train, flights = torch.is_grad_enabled() and self.returns(h_TW), list[Flight]()

        def start() -> Flight:
            if self.released is not None and rows is not None:
                flights.append(self.start_rows(rows, lengths, train=train))
            else:
                flights.append(self.start_forward(h_TW, lengths, rows, train=train))
            return flights[-1]

        g_TD = _cross(h_TW, self, start) if train else self._landed(start())
        return self.join(h_TD, g_TD, flights[-1].noise_TW)

    def narrow(self, h_TD: torch.Tensor, lengths: list[int], rows: list[list[int]] | None = None) -> torch.Tensor:
        """What of bottom's result crosses, ``[T, W]``: all of it, or its projection to the recipe's width.

        Where it has a gradient it is clipped here already, so that the gradient knows; the boundary clips everything.
        """
        h_TW = self.projected(h_TD)
        if not (torch.is_grad_enabled() and h_TW.requires_grad):
            return h_TW
        return self.boundary.clipped(h_TW, "forward", self.records.subjects(rows, lengths))

    def projected(self, h_TD: torch.Tensor) -> torch.Tensor:
        """The same, not clipped yet."""
        return project(h_TD, self._layer(0, DOWN))

    def join(self, h_TD: torch.Tensor, g_TD: torch.Tensor, noise_TW: torch.Tensor | None = None) -> torch.Tensor:
        """What top gets for the trunk's answer to ``h_TD``: the answer, or with a residual path their weighted sum.

        Args:
            noise_TW: what the boundary added before the trunk answered: what is known of its effect is taken out.
        """
        gate_D, denoise_DW = self._layer(1, GATE), self._layer(1, DENOISE)
        if denoise_DW is not None and noise_TW is not None:
            g_TD = g_TD - project(noise_TW.to(g_TD.dtype), denoise_DW)
        return g_TD if gate_D is None else h_TD + gate_D.to(g_TD.dtype) * g_TD

    def noise_in(self, matrix: pb.Matrix, h_TW: torch.Tensor, subjects: Subjects) -> torch.Tensor | None:
        """What boundary and codec added to ``h_TW`` after clipping, if top wants to know."""
        if self._layer(1, DENOISE) is None:
            return None
        return self.boundary.reread(matrix, h_TW) - self.boundary.clipped(h_TW.detach(), "forward", subjects)

    def _layer(self, end: int, name: str) -> torch.Tensor | None:
        return tensor_of(self._ends[end], name) if self._ends else None

    @property
    def releases_once(self) -> bool:
        return self.released is not None

    def from_rows(self, rows: list[list[int]], lengths: list[int]) -> torch.Tensor:
        if torch.is_grad_enabled() and self.returns(None):
            return _cross(None, self, lambda: self.start_rows(rows, lengths))
        return self._landed(self.start_rows(rows, lengths, train=False))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Passes within teach the trunk's adapter nothing: of their gradients it answers with bottom's alone."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def returns(self, h_TW: torch.Tensor | None) -> bool:
        """Whether a loss gradient crosses for these hidden states, None for such as were released before."""
        return self.gradients and (not self._aside or (h_TW is not None and h_TW.requires_grad))

    def affordable(
        self, rows: list[list[int]], lengths: list[int], *, train: bool = True, twice: bool = False
    ) -> list[bool]:
        """For each sequence of token ids, whether the privacy budgets bear that its last ``lengths`` tokens cross.

        Args:
            train: in a whole training step, forward and backward, rather than in a forward alone.
            twice: with a pass aside before it.
        """
        subjects = self.records.subjects(rows, lengths)
        examples = [Ending(tuple(row), length) for row, length in zip(rows, lengths, strict=True)]
        if self.released is None:
            forward = [1 + twice] * len(rows)
        else:
            forward = [int(not self.released.holds(example)) for example in examples]
        bottom = any(one.requires_grad for part in self._ends[:1] for one in part.parameters())
        return self.boundary.affordable(subjects, forward, gradient=train * self.gradients * (1 + (twice and bottom)))

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
        subjects = self.records.subjects(rows, lengths)
        hidden = self.boundary.release(h_TW, "forward", step, subjects)
        request, like_TD = pb.Forward(step=step, lengths=lengths, hidden=hidden, train=train), self.answer_to(h_TW)
        flight = Flight(step, like_TD, "forward", True, self.channel.submit(request), subjects, h_TW.shape[1])
        return replace(flight, noise_TW=self.noise_in(hidden, h_TW, subjects))

    def start_rows(self, rows: list[list[int]], lengths: list[int], *, train: bool = True) -> Flight:
        """As ``start_forward``, for the last ``lengths`` tokens of these rows of token ids.

        Those never released before run through bottom first.
        """
        assert self.released is not None
        step = next(self._steps)
        subjects = self.records.subjects(rows, lengths)
        examples = [Ending(tuple(row), length) for row, length in zip(rows, lengths, strict=True)]
        keeps = self._keep(self.released.release(examples, step, self.records))
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
        request = pb.Backward(step=forward.step, gradient=gradient, reply=reply, aside=self._aside)
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
