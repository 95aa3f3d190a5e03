"""The trunk as an autograd module whose forward and backward cross the wire, and a client of the trunk's rounds.

Shapes: T tokens of all sequences one after another, D the model's width, W the width that crosses.
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
from isthmus.recipe import RoundSteps
from isthmus.silo.boundary import Boundary
from isthmus.silo.served import ServedRound
from isthmus.silo.session import RemoteSession
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel

MAX_PENDING_EXAMPLES = 64
"""Largest number of examples sent to the trunk whose answers have not arrived."""


@dataclass
class PendingStep:
    """A forward or backward request whose answer has not been read yet."""

    step: int
    path: Path
    answer: Answer
    shape: tuple[int, int]
    """Expected shape of the answer's matrix: rows and width."""
    like: torch.Tensor
    """A tensor with the device and dtype for the answer."""
    subjects: Subjects
    """The records that the sequences belong to."""
    width: int
    """Width of the hidden states that were sent: W."""
    reply: bool = True
    """Whether the answer holds a matrix."""
    noise_TW: torch.Tensor | None = None
    """The noise and rounding error in the hidden states that were sent; None unless the bottleneck denoises."""
    request: pb.Forward | None = None
    """A forward that names released examples: it is sent again if the trunk has evicted one of them. Otherwise None."""
    example_answers: list[Answer] = field(default_factory=list)
    """Answers to the frames that carried its new examples."""


class RemoteTrunk(nn.Module):
    """Implements ``model.split.TrunkModule`` over a channel: forwards, backwards, and sessions for generation.

    Args:
        width: the model's width, D.
        gradients: whether loss gradients leave the silo. Without them neither the trunk nor bottom trains.
        denoise: whether replies contain the noise that the boundary added.
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
        # Autograd calls backward only if an input requires grad. With a frozen bottom only this one does.
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(self, outbound: Outbound) -> Reply:
        """Send a batch and wait for the trunk's answer; with gradients enabled the answer is differentiable."""
        if outbound.cache is not None:
            session = outbound.cache.session
            assert isinstance(session, RemoteSession)
            return session.step(outbound)
        train = torch.is_grad_enabled() and self.wants_gradient(outbound)
        pending = self.send(outbound, train=train)
        if not train:
            return Reply(self._receive_matrix(pending), pending.noise_TW)
        g_TD = _Crossing.apply(outbound.h_TW, self._anchor, self, pending)  # type: ignore[no-untyped-call]
        return Reply(g_TD, pending.noise_TW)

    def open_session(self) -> RemoteSession:
        """A session with an empty KV cache. Sessions that were garbage collected are closed on the trunk first."""
        while self._abandoned:
            self.channel.submit(pb.Close(session=self._abandoned.popleft()))
        number = next(self._sessions)
        session = RemoteSession(self.channel, self._boundary, number, self._width, denoise=self._denoise)
        weakref.finalize(session, self._abandoned.append, session.id)
        return session

    @contextmanager
    def ascent_pass(self) -> Iterator[None]:
        """Context of a sharpness-aware ascent pass: the trunk returns bottom's gradient, and its adapter gets none."""
        self._ascent_pass = True
        try:
            yield
        finally:
            self._ascent_pass = False

    def wants_gradient(self, outbound: Outbound) -> bool:
        """Whether this batch's loss gradient crosses."""
        wanted = outbound.h_TW is not None and outbound.h_TW.requires_grad
        return self.gradients and (wanted or not self._ascent_pass)

    def send(self, outbound: Outbound, *, train: bool = True) -> PendingStep:
        """Send a batch's hidden states, or the identifiers of its examples, without waiting for the answer.

        Args:
            train: whether a gradient will follow.

        Raises:
            BudgetExhausted: a record's privacy budget, or the silo's, does not allow the release. Nothing leaves.
        """
        step, subjects, h_TW = next(self._steps), outbound.subjects, outbound.h_TW
        assert subjects is not None
        dropout = train and self.training  # as in the uncut model, dropout follows the mode that model.train() sets
        shape, like = (sum(outbound.lengths), self._width), h_TW if outbound.like is None else outbound.like
        assert like is not None
        width = self._width if h_TW is None else h_TW.shape[1]
        if outbound.examples is not None:
            example_answers = self._send_examples(self._release_example(one, step) for one in outbound.fresh)
            request = pb.Forward(
                step=step, lengths=outbound.lengths, examples=outbound.examples, train=train, dropout=dropout
            )
            answer = self.channel.submit(request)
            return PendingStep(
                step, "forward", answer, shape, like, subjects, width, request=request, example_answers=example_answers
            )
        assert h_TW is not None
        hidden = self._boundary.release(h_TW, "forward", step, subjects)
        request = pb.Forward(step=step, lengths=outbound.lengths, hidden=hidden, train=train, dropout=dropout)
        answer = self.channel.submit(request)
        noise_TW = self._boundary.added_noise(hidden, h_TW, subjects) if self._denoise else None
        return PendingStep(step, "forward", answer, shape, like, subjects, width, noise_TW=noise_TW)

    def send_gradient(self, forward: PendingStep, gradient_TD: torch.Tensor, *, reply: bool) -> PendingStep:
        """Send the loss gradient of a forward's answer, without waiting for the answer.

        Args:
            forward: the request whose answer the gradient is of.
            gradient_TD: the loss gradient of the trunk's output.
            reply: whether the trunk should return the gradient of the hidden states that were sent.

        Raises:
            BudgetExhausted: a record's privacy budget, or the silo's, does not allow the release. Nothing leaves.
        """
        gradient = self._boundary.release(gradient_TD, "gradient", forward.step, forward.subjects)
        request = pb.Backward(step=forward.step, gradient=gradient, reply=reply, ascent_pass=self._ascent_pass)
        shape = (len(gradient_TD), forward.width)
        answer = self.channel.submit(request)
        return PendingStep(forward.step, "gradient", answer, shape, gradient_TD, forward.subjects, forward.width, reply)

    def receive(self, pending: PendingStep) -> torch.Tensor | None:
        """Wait for the answer: ``[T, D]`` of a forward, ``[T, W]`` of a backward, None of a backward without reply."""
        if pending.reply:
            return self._receive_matrix(pending)
        pending.answer.result()
        return None

    def _receive_matrix(self, pending: PendingStep) -> torch.Tensor:
        body = self._await_answer(pending)
        matrix = body.hidden if pending.path == "forward" else body.gradient
        return self._boundary.decode_reply(matrix, pending.path, pending.shape, pending.like)

    def _await_answer(self, pending: PendingStep) -> Any:
        """The answer. If the trunk evicted examples, their stored frames and the request are sent again, once."""
        request = pending.request
        if request is None:
            return pending.answer.result()
        try:
            _wait_for(pending.example_answers)
            return pending.answer.result()
        except UnknownExampleError:
            pass
        request.step = pending.step = next(self._steps)  # the trunk may have seen a later step already
        example_answers = self._send_examples(self._boundary.released_frames(request.examples))
        answer = self.channel.submit(request)
        _wait_for(example_answers)
        return answer.result()

    def _release_example(self, example: FreshExample, step: int) -> pb.Keep:
        hidden = self._boundary.release_example(example.number, example.h_LW, step, example.subjects)
        return pb.Keep(example=example.number, hidden=hidden)

    def _send_examples(self, requests: Iterable[pb.Keep]) -> list[Answer]:
        """Send examples, with at most ``MAX_PENDING_EXAMPLES`` unanswered at a time."""
        answers: list[Answer] = []
        for request in requests:
            if len(answers) >= MAX_PENDING_EXAMPLES:
                answers[-MAX_PENDING_EXAMPLES].result()
            answers.append(self.channel.submit(request))
        return answers


class RoundsClient:
    """Client of the trunk's rounds and optimizer steps.

    A training step is one or more forwards and backwards through the split model, whose gradients accumulate, and then
    ``commit``.

    Args:
        served: the round of the silo's adapters; it is no longer checked once the silo trains.
    """

    def __init__(self, channel: Channel, served: ServedRound | None = None) -> None:
        self._channel = channel
        self._served = served or ServedRound()

    def begin(self, round: int, participants: list[str], steps: RoundSteps | None = None) -> None:
        """Start a round, from 1, and wait until all participants have started it.

        Args:
            steps: this silo's own; None: the recipe says how many.
        """
        self._served.release()
        own = None if steps is None else pb.Steps(count=steps.count, before=steps.before, total=steps.total)
        self._channel.call(pb.Begin(round=round, participants=participants, steps=own))

    def commit(self, round: int, step: int, weight: float) -> int:
        """End an optimizer step: wait until the trunk has updated its adapter with the gradients of this step.

        Args:
            round, step: both from 1.
            weight: number of supervised tokens in the step.

        Returns:
            The number of silos whose gradients the trunk's step used.
        """
        stepped: pb.Stepped = self._channel.call(pb.Commit(round=round, step=step, weight=weight))
        return stepped.contributors


def _wait_for(answers: Iterable[Answer]) -> None:
    """Wait for all answers. Raises the first error among them."""
    for answer in answers:
        answer.result()


class _Crossing(torch.autograd.Function):
    """Autograd node of a request: forward waits for the answer, backward sends its gradient to the trunk."""

    @staticmethod
    def forward(
        ctx: Any, h_TW: torch.Tensor | None, anchor: torch.Tensor, trunk: RemoteTrunk, pending: PendingStep
    ) -> torch.Tensor:
        ctx.trunk, ctx.pending = trunk, pending
        return trunk._receive_matrix(pending)

    @staticmethod
    def backward(ctx: Any, gradient_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        returned = ctx.trunk.send_gradient(ctx.pending, gradient_TD, reply=ctx.needs_input_grad[0])
        return ctx.trunk.receive(returned), None, None, None
