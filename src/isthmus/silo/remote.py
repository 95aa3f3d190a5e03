"""The trunk as an autograd module whose forward and backward cross the wire.

Shapes: T tokens of all sequences one after another, D the model's width, W the width that crosses.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from isthmus.errors import UnknownExampleError
from isthmus.model.answers import digest
from isthmus.model.crossing import FreshExample, Outbound, Reply
from isthmus.privacy.events import Path
from isthmus.privacy.subjects import Subjects
from isthmus.silo.boundary import Boundary
from isthmus.silo.rounds_client import RoundsClient
from isthmus.silo.session import RemoteSession
from isthmus.silo.stand_in import StandIn
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel

log = logging.getLogger(__name__)
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
    tokens: int = 0
    """Number of tokens in its loss; of all its tokens, if the model does not compute the loss."""
    reply: bool = True
    """Whether the answer holds a matrix."""
    trains: bool = False
    """Whether it is a backward that adds to the gradients of the trunk's adapter."""
    noise_TW: torch.Tensor | None = None
    """The noise and rounding error in the hidden states that were sent; None unless the bottleneck denoises."""
    request: pb.Forward | None = None
    """A forward that names released examples: it is sent again if the trunk has evicted one of them. Otherwise None."""
    bases: list[torch.Tensor | None] | None = None
    """The answers before about its examples, if the trunk may answer with differences from them. Otherwise None."""
    example_answers: list[Answer] = field(default_factory=list)
    """Answers to the frames that carried its new examples."""


class RemoteTrunk(nn.Module):
    """Implements ``model.split.TrunkModule`` over a channel: forwards, backwards, and sessions for generation.

    Its only parameter is that of ``stand_in``, by which an optimizer of the whole model steps the trunk.

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
        self._warned = False
        self.rounds = RoundsClient(channel, gradients=gradients)
        self.stand_in = StandIn(self.rounds, trains=gradients, exact=not boundary.noised)

    def forward(self, outbound: Outbound) -> Reply:
        """Send a batch and wait for the trunk's answer; with gradients enabled the answer is differentiable.

        Raises:
            ProtocolError: bottom and top were stepped since the last backward, the trunk was not.
        """
        self.stand_in.check_stepped()
        if outbound.cache is not None:
            session = outbound.cache.session
            assert isinstance(session, RemoteSession)
            return session.step(outbound)
        train = torch.is_grad_enabled() and self.wants_gradient(outbound)
        if torch.is_autocast_enabled(self.stand_in.lora.device.type) and not self._warned:
            self._warned = True
            log.warning("mixed precision (autocast, bf16=True) is the silo's: the trunk computes in its own dtype")
        pending = self.send(outbound, train=train)
        if not train:
            return Reply(self._receive_matrix(pending), pending.noise_TW)
        # Autograd calls backward only if an input requires grad. With a frozen bottom only the stand-in does.
        g_TD = _Crossing.apply(outbound.h_TW, self.stand_in.lora, self, pending)  # type: ignore[no-untyped-call]
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
        return self.gradients and (wanted or (self.stand_in.trains and not self._ascent_pass))

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
        tokens = shape[0] if outbound.supervised is None else min(outbound.supervised, shape[0])  # labels of padding
        if outbound.examples is not None:
            example_answers = self._send_examples(self._release_example(one, step) for one in outbound.fresh)
            request = pb.Forward(
                step=step, lengths=outbound.lengths, examples=outbound.examples, train=train, dropout=dropout
            )
            bases = self._boundary.earlier_answers(outbound.examples, outbound.lengths)
            if bases is not None:
                request.answered.extend(map(digest, bases))
            answer = self.channel.submit(request)
            return PendingStep(
                step,
                "forward",
                answer,
                shape,
                like,
                subjects,
                width,
                tokens,
                request=request,
                bases=bases,
                example_answers=example_answers,
            )
        assert h_TW is not None
        hidden = self._boundary.release(h_TW, "forward", step, subjects)
        request = pb.Forward(step=step, lengths=outbound.lengths, hidden=hidden, train=train, dropout=dropout)
        answer = self.channel.submit(request)
        noise_TW = self._boundary.added_noise(hidden, h_TW, subjects) if self._denoise else None
        return PendingStep(step, "forward", answer, shape, like, subjects, width, tokens, noise_TW=noise_TW)

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
        trains = self.stand_in.trains and not self._ascent_pass
        request = pb.Backward(step=forward.step, gradient=gradient, reply=reply, ascent_pass=not trains)
        if trains and (keep := self.stand_in.keep()) is not None:
            request.keep = keep
        return PendingStep(
            forward.step,
            "gradient",
            self.channel.submit(request),
            (len(gradient_TD), forward.width),
            gradient_TD,
            forward.subjects,
            forward.width,
            forward.tokens,
            reply,
            trains,
        )

    def receive(self, pending: PendingStep) -> torch.Tensor | None:
        """Wait for the answer: ``[T, D]`` of a forward, ``[T, W]`` of a backward, None of a backward without reply."""
        body = self._await_answer(pending)
        if pending.trains:
            self.stand_in.receive(body.norm, pending.tokens)
        return self._decode(body, pending) if pending.reply else None

    def _receive_matrix(self, pending: PendingStep) -> torch.Tensor:
        return self._decode(self._await_answer(pending), pending)

    def _decode(self, body: Any, pending: PendingStep) -> torch.Tensor:
        if pending.bases is not None:
            assert pending.request is not None
            return self._boundary.decode_answers(body, pending.request, pending.bases, self._width).to(pending.like)
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
    @once_differentiable
    def backward(ctx: Any, gradient_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        returned = ctx.trunk.send_gradient(ctx.pending, gradient_TD, reply=ctx.needs_input_grad[0])
        return ctx.trunk.receive(returned), None, None, None
