"""The trunk as a silo sees it: a module whose forward and backward cross the wire, and a client of its rounds.

Shapes: T tokens of all sequences one after another, D the model's width, W numbers that cross of it.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from isthmus.errors import UnknownExampleError
from isthmus.model.crossing import FreshExample, Outbound
from isthmus.model.split import Reply
from isthmus.privacy.events import Path
from isthmus.privacy.subjects import Subjects
from isthmus.silo.boundary import Boundary
from isthmus.silo.session import RemoteSession
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel

KEEPS = 64
"""Examples that may be on their way to the trunk at a time."""


@dataclass
class PendingStep:
    """A forward or backward that was sent, until its answer is there."""

    step: int
    path: Path
    answer: Answer
    shape: tuple[int, int]
    """Rows and width of the matrix in the answer."""
    like: torch.Tensor
    """Any tensor on the device and of the dtype that the answer is wanted in."""
    subjects: Subjects
    width: int
    """Of the hidden states that were sent: W."""
    reply: bool = True
    """Whether the answer holds a matrix."""
    noise_TW: torch.Tensor | None = None
    """What boundary and codec added to the hidden states, where the bottleneck denoises."""
    request: pb.Forward | None = None
    """A forward by numbers: it is sent again if the trunk has forgotten one of them."""
    keeps: list[Answer] = field(default_factory=list)
    """Of the examples that were sent for it."""


class RemoteTrunk(nn.Module):
    """Implements ``model.split.TrunkModule`` over a channel: forwards, backwards, and sessions for generation.

    Args:
        width: of the model: D.
        gradients: whether loss gradients leave. Without them the trunk learns nothing, and hidden states get none.
        denoise: whether replies tell the noise that the boundary added.
    """

    def __init__(
        self, channel: Channel, boundary: Boundary, width: int, *, gradients: bool = True, denoise: bool = False
    ) -> None:
        super().__init__()
        self.channel = channel
        self.gradients = gradients
        self._boundary = boundary
        self._width = width
        self._denoise = denoise
        self._steps = itertools.count(1)
        self._sessions = itertools.count(1)
        self._abandoned: deque[int] = deque()
        self._ascent_pass = False
        # Autograd calls our backward only if an input requires grad; a frozen bottom gives none, this one always does.
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(self, outbound: Outbound) -> Reply:
        if outbound.cache is not None:
            session = outbound.cache.session
            assert isinstance(session, RemoteSession)
            return session.step(outbound)
        train = torch.is_grad_enabled() and self.wants_gradient(outbound)
        pending = self.send(outbound, train=train)
        if not train:
            return Reply(self._matrix(pending), pending.noise_TW)
        g_TD = _Crossing.apply(outbound.h_TW, self._anchor, self, pending)  # type: ignore[no-untyped-call]
        return Reply(g_TD, pending.noise_TW)

    def open_session(self) -> RemoteSession:
        while self._abandoned:
            self.channel.submit(pb.Close(session=self._abandoned.popleft()))
        number = next(self._sessions)
        session = RemoteSession(self.channel, self._boundary, number, self._width, denoise=self._denoise)
        weakref.finalize(session, self._abandoned.append, session.id)
        return session

    @contextmanager
    def ascent_pass(self) -> Iterator[None]:
        """Passes within teach the trunk's adapter nothing: it answers their gradients with bottom's alone."""
        self._ascent_pass = True
        try:
            yield
        finally:
            self._ascent_pass = False

    def wants_gradient(self, outbound: Outbound) -> bool:
        """Whether a loss gradient crosses for this batch."""
        wanted = outbound.h_TW is not None and outbound.h_TW.requires_grad
        return self.gradients and (wanted or not self._ascent_pass)

    def send(self, outbound: Outbound, *, train: bool = True) -> PendingStep:
        """Send a batch's hidden states, or the numbers of its examples, and do not wait for the answer.

        Args:
            train: a gradient will follow.

        Raises:
            BudgetExhausted: a record's budget, or the silo's, does not allow the release. Nothing leaves.
        """
        step, subjects, h_TW = next(self._steps), outbound.subjects, outbound.h_TW
        assert subjects is not None
        shape, like = (sum(outbound.lengths), self._width), h_TW if outbound.like is None else outbound.like
        assert like is not None
        width = self._width if h_TW is None else h_TW.shape[1]
        if outbound.examples is not None:
            keeps = self._keep(self._released(one, step) for one in outbound.fresh)
            request = pb.Forward(step=step, lengths=outbound.lengths, examples=outbound.examples, train=train)
            answer = self.channel.submit(request)
            return PendingStep(step, "forward", answer, shape, like, subjects, width, request=request, keeps=keeps)
        assert h_TW is not None
        hidden = self._boundary.release(h_TW, "forward", step, subjects)
        request = pb.Forward(step=step, lengths=outbound.lengths, hidden=hidden, train=train)
        answer = self.channel.submit(request)
        noise_TW = self._boundary.noise_in(hidden, h_TW, subjects) if self._denoise else None
        return PendingStep(step, "forward", answer, shape, like, subjects, width, noise_TW=noise_TW)

    def send_gradient(self, forward: PendingStep, gradient_TD: torch.Tensor, *, reply: bool) -> PendingStep:
        """Send the loss gradient of a forward's answer, and do not wait.

        Args:
            reply: the gradient of the hidden states that were sent is wanted.
        """
        gradient = self._boundary.release(gradient_TD, "gradient", forward.step, forward.subjects)
        request = pb.Backward(step=forward.step, gradient=gradient, reply=reply, ascent_pass=self._ascent_pass)
        shape = (len(gradient_TD), forward.width)
        answer = self.channel.submit(request)
        return PendingStep(forward.step, "gradient", answer, shape, gradient_TD, forward.subjects, forward.width, reply)

    def receive(self, pending: PendingStep) -> torch.Tensor | None:
        """Wait for the answer; None for a backward without reply."""
        if pending.reply:
            return self._matrix(pending)
        pending.answer.result()
        return None

    def _matrix(self, pending: PendingStep) -> torch.Tensor:
        body = self._answered(pending)
        matrix = body.hidden if pending.path == "forward" else body.gradient
        return self._boundary.admit(matrix, pending.path, pending.shape, pending.like)

    def _answered(self, pending: PendingStep) -> Any:
        """The answer. Examples that the trunk has forgotten are sent again first, once, as they were before."""
        request = pending.request
        if request is None:
            return pending.answer.result()
        try:
            _wait(pending.keeps)
            return pending.answer.result()
        except UnknownExampleError:
            pass
        request.step = pending.step = next(self._steps)  # a later step may be open already
        keeps = self._keep(self._boundary.again(request.examples))
        answer = self.channel.submit(request)
        _wait(keeps)
        return answer.result()

    def _released(self, example: FreshExample, step: int) -> pb.Keep:
        hidden = self._boundary.release_example(example.number, example.h_LW, step, example.subjects)
        return pb.Keep(example=example.number, hidden=hidden)

    def _keep(self, requests: Iterable[pb.Keep]) -> list[Answer]:
        """Send examples, without waiting as long as few are on their way."""
        answers: list[Answer] = []
        for request in requests:
            if len(answers) >= KEEPS:
                answers[-KEEPS].result()
            answers.append(self.channel.submit(request))
        return answers


class RoundsClient:
    """Rounds and optimizer steps on the trunk.

    A training step is: forwards and backwards through the split model (as many as gradients are accumulated), then
    ``commit``.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def begin(self, round: int, participants: list[str]) -> None:
        """Wait until all participants are ready for this round's first step."""
        self._channel.call(pb.Begin(round=round, participants=participants))

    def commit(self, round: int, step: int, weight: float) -> int:
        """Hand in the gradients of this optimizer step and wait until the trunk has stepped.

        Args:
            round, step: both from 1.
            weight: supervised tokens behind the gradients.

        Returns:
            The number of silos whose gradients the trunk's step was made of.
        """
        stepped: pb.Stepped = self._channel.call(pb.Commit(round=round, step=step, weight=weight))
        return stepped.contributors


def _wait(answers: Iterable[Answer]) -> None:
    """Until all are there; raises the first error among them."""
    for answer in answers:
        answer.result()


class _Crossing(torch.autograd.Function):
    """Gives the answer to a forward that was sent, and sends the gradient back when autograd has it."""

    @staticmethod
    def forward(
        ctx: Any, h_TW: torch.Tensor | None, anchor: torch.Tensor, trunk: RemoteTrunk, pending: PendingStep
    ) -> torch.Tensor:
        ctx.trunk, ctx.pending = trunk, pending
        return trunk._matrix(pending)

    @staticmethod
    def backward(ctx: Any, gradient_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        returned = ctx.trunk.send_gradient(ctx.pending, gradient_TD, reply=ctx.needs_input_grad[0])
        return ctx.trunk.receive(returned), None, None, None
