"""The trunk as the silo's model sees it: a module whose forward and backward cross the wire.

Shapes: T tokens of all sequences one after another, D width.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from isthmus.errors import UnknownSessionError
from isthmus.privacy.events import Path
from isthmus.silo.boundary import Boundary
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel

REPLAYS = 16
"""Times that a lost session's frames are sent again for one step."""


@dataclass(frozen=True)
class Flight:
    """A training step's tensor on its way through the trunk."""

    step: int
    sent_TD: torch.Tensor
    path: Path
    reply: bool
    answer: Answer


class RemoteTrunk(nn.Module):
    """Implements ``model.split.TrunkModule`` over a channel.

    A training step is: forwards and backwards (as many as gradients are accumulated), then ``commit``.
    """

    def __init__(self, channel: Channel, boundary: Boundary) -> None:
        super().__init__()
        self.channel = channel
        self.boundary = boundary
        self._steps = itertools.count(1)
        self._sessions = itertools.count(1)
        self._abandoned: deque[int] = deque()
        # Autograd calls our backward only if an input requires grad; a frozen bottom gives none, this one always does.
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(self, h_TD: torch.Tensor, lengths: list[int], session: RemoteSession | None) -> torch.Tensor:
        if session is not None:
            return session.step(h_TD, lengths)
        if torch.is_grad_enabled():
            crossed: torch.Tensor = _Crossing.apply(h_TD, self._anchor, self, lengths)  # type: ignore[no-untyped-call]
            return crossed
        return self._landed(self._start_forward(h_TD, lengths, train=False))

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
        session = RemoteSession(self.channel, self.boundary, next(self._sessions))
        weakref.finalize(session, self._abandoned.append, session.id)
        return session

    def start_forward(self, h_TD: torch.Tensor, lengths: list[int]) -> Flight:
        """Send a training step's hidden states, and do not wait for the answer."""
        return self._start_forward(h_TD, lengths, train=True)

    def start_backward(self, forward: Flight, gradient_TD: torch.Tensor, *, reply: bool) -> Flight:
        """Send the gradient of what a forward gave; ``reply`` if the gradient of what it took is wanted."""
        gradient = self.boundary.release(gradient_TD, "gradient", forward.step)
        request = pb.Backward(step=forward.step, gradient=gradient, reply=reply)
        return Flight(forward.step, gradient_TD, "gradient", reply, self.channel.submit(request))

    def land(self, flight: Flight) -> torch.Tensor | None:
        """Wait for the answer; None for a backward without reply."""
        if flight.reply:
            return self._landed(flight)
        flight.answer.result()
        return None

    def _start_forward(self, h_TD: torch.Tensor, lengths: list[int], *, train: bool) -> Flight:
        step = next(self._steps)
        hidden = self.boundary.release(h_TD, "forward", step)
        request = pb.Forward(step=step, lengths=lengths, hidden=hidden, train=train)
        return Flight(step, h_TD, "forward", True, self.channel.submit(request))

    def _landed(self, flight: Flight) -> torch.Tensor:
        body: Any = flight.answer.result()
        matrix = body.hidden if flight.path == "forward" else body.gradient
        return self.boundary.admit(matrix, flight.path, flight.sent_TD)


class _Crossing(torch.autograd.Function):
    """One training step's way through the trunk and back."""

    @staticmethod
    def forward(
        ctx: Any, h_TD: torch.Tensor, anchor: torch.Tensor, remote: RemoteTrunk, lengths: list[int]
    ) -> torch.Tensor:
        ctx.remote = remote
        ctx.flight = remote.start_forward(h_TD, lengths)
        return remote.land(ctx.flight)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, gradient_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flight = ctx.remote.start_backward(ctx.flight, gradient_TD, reply=ctx.needs_input_grad[0])
        return ctx.remote.land(flight), None, None, None


class RemoteSession:
    """One KV cache on the trunk. Implements ``model.cache.TrunkSession``.

    Sent frames are kept: a trunk that lost the session gets them again, as they were, with their noise.
    """

    def __init__(self, channel: Channel, boundary: Boundary, id: int) -> None:
        self.id = id
        self._channel = channel
        self._boundary = boundary
        self._sent: list[pb.Decode] = []
        self._forget = 0
        self._rows: list[int] = []

    def step(self, h_TD: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Append these tokens to the cache and run them."""
        number = len(self._sent)
        request = pb.Decode(
            session=self.id,
            step=number,
            lengths=lengths,
            hidden=self._boundary.release(h_TD, "forward", number),
            forget=self._forget,
            rows=self._rows,
        )
        self._forget, self._rows = 0, []
        self._sent.append(request)
        return self._boundary.admit(self._ask(request).hidden, "forward", h_TD)

    def forget(self, positions: int) -> None:
        self._forget += positions

    def select(self, rows: list[int]) -> None:
        self._rows = [self._rows[row] for row in rows] if self._rows else list(rows)

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
