"""Collecting a round's updates: from the silos or edges that begin it to what they learned together.

All kinds have the same life: children contribute or are lost, and once nobody is waited for any more ``done`` gets what
there is. All calls come under the rounds' lock.

Shapes: P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from google.protobuf.message import Message

from isthmus.errors import FrameError, IsthmusError, ProtocolError
from isthmus.federation.contribution import Contribution
from isthmus.federation.quantize import Integers, Ring
from isthmus.model.flat import Layout
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.barrier import Barrier
from isthmus.wire.channel import Answer, answered

MakeBarrier = Callable[[Callable[[dict[str, None]], None]], Barrier[None]]


@dataclass(frozen=True)
class Collected:
    """What a round's silos contributed."""

    weights: dict[str, float]
    """Of each silo that contributed; under masks 1, or 0 for one that learned nothing: what it weighs is in the sum."""
    contributions: tuple[Contribution, ...]
    """One for each silo or edge that learned something, or one mean of all."""
    total_P: Integers | None = None
    """Under masks: the sum of all silos' numbers, at last of their weights; None if nobody learned anything."""


Done = Callable[[Collected | IsthmusError], None]
"""Gets an error where the updates came, but nothing can be known of their sum."""


class Collection(Protocol):
    """One round's updates."""

    def handle(self, peer: str, request: Message) -> Answer:
        """A participant's message.

        Raises:
            RoundLostError: it comes when the round has gone on without the silo.
            ProtocolError, FrameError: it is not due, or not what is due.
        """
        ...

    def awaits(self, peer: str) -> bool:
        """Whether this silo has still to do with the round."""
        ...

    def lose(self, peer: str) -> bool:
        """This silo's process is a new one: do not wait for it. True if nobody is left and nothing was contributed."""
        ...


class Open:
    """Each silo's update by itself; the root sees them all.

    Args:
        layouts: of the participants' updates.
    """

    def __init__(self, layouts: Mapping[str, Layout], barrier: MakeBarrier, done: Done) -> None:
        self._layouts, self._done = layouts, done
        self._awaited = set(layouts)
        self._weights: dict[str, float] = {}
        self._contributions: dict[str, Contribution] = {}
        self._barrier = barrier(lambda _: self._finish())
        self._barrier.expect(self._awaited)

    def handle(self, peer: str, request: Message) -> Answer:
        if not isinstance(request, pb.Update):
            raise ProtocolError("this federation's updates are open", remedy="give all parties one recipe")
        if peer not in self._awaited:
            raise ProtocolError(f"{peer} is no participant of round {request.round}", remedy="ask for a plan")
        self._take(peer, request)
        self._awaited.remove(peer)
        self._weights[peer] = request.weight
        self._barrier.arrive(peer, None)
        return answered(pb.Accepted())

    def awaits(self, peer: str) -> bool:
        return peer in self._awaited

    def lose(self, peer: str) -> bool:
        self._awaited.discard(peer)
        self._barrier.dismiss(peer)
        return not self._awaited and not self._weights

    def _take(self, peer: str, request: pb.Update) -> None:
        if request.masked:
            raise ProtocolError("this federation's updates are open", remedy="give all parties one recipe")
        if request.weight:
            change = codec.decode_named(request.tensors, self._layouts[peer].shapes)
            self._contributions[peer] = Contribution(peer, request.weight, change, request.quality)

    def _finish(self) -> None:
        self._done(self._collected(dict(sorted(self._weights.items()))))

    def _collected(self, weights: dict[str, float]) -> Collected:
        return Collected(weights, tuple(self._contributions[peer] for peer in sorted(self._contributions)))


class Sums(Open):
    """The sums that edges took the masks off: each cohort's by itself, and the sum of all, exact.

    Args:
        ring: of numbers of which every silo of the federation adds one.
    """

    def __init__(self, peers: Iterable[str], layout: Layout, ring: Ring, barrier: MakeBarrier, done: Done) -> None:
        super().__init__(dict.fromkeys(peers, layout), barrier, done)
        self._layout, self._ring = layout, ring
        self._total_P: Integers | None = None

    def _take(self, peer: str, request: pb.Update) -> None:
        if request.tensors or (request.weight and not request.masked):
            raise ProtocolError("this federation's updates are masked", remedy="give all parties one recipe")
        if not request.weight:
            return
        whole_P = self._ring.whole(self._ring.unpack(request.masked, self._layout.size + 1))
        if abs(whole_P).max() > min(request.weight, self._ring.silos) * self._ring.levels:
            raise FrameError(f"the sum of {peer} is beyond what so many silos can add", remedy="leave that edge out")
        if (contribution := mean(peer, whole_P, self._ring, self._layout)) is not None:
            self._contributions[peer] = contribution
            self._total_P = whole_P if self._total_P is None else self._total_P + whole_P

    def _collected(self, weights: dict[str, float]) -> Collected:
        return replace(super()._collected(weights), total_P=self._total_P)


def mean(name: str, total_P: Integers, ring: Ring, layout: Layout) -> Contribution | None:
    """What the silos learned of whose numbers, each times its weight, and at last weights this is the sum."""
    weight = float(total_P[-1]) / ring.levels
    if weight <= 0:
        return None
    change_P = torch.from_numpy(total_P[:-1] * (ring.range / ring.levels / weight))
    return Contribution(name, weight, layout.tensors(change_P))
