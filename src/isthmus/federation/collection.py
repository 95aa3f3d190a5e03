"""Collecting a round's updates: from the silos or edges that begin it to what they learned together.

All kinds have the same life: children contribute or are lost, and once nobody is waited for any more ``done`` gets what
there is. All calls come under the rounds' lock.

Shapes: P parameters, K numbers that cross of them, S digits of a share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from google.protobuf.message import Message

from isthmus.errors import FrameError, IsthmusError, ProtocolError
from isthmus.federation.contribution import Contribution
from isthmus.updates.compression import Compressor
from isthmus.updates.flat import Layout
from isthmus.updates.projections import Projection
from isthmus.updates.quantize import Integers, Ring
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
    total_KS: Integers | None = None
    """Under masks: the sum of all silos' numbers, at last of their shares; None if nobody learned anything."""
    staleness: dict[str, int] | None = None
    """Out of a buffer: for each silo, the versions that came out since it began."""
    sums: SumFormat | None = None
    """How that sum is read."""


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
        compressors: read those of the participants that compress theirs; the others' come in full, by name.
    """

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        barrier: MakeBarrier,
        done: Done,
        *,
        compressors: Mapping[str, Compressor] | None = None,
    ) -> None:
        self._layouts, self._compressors, self._done = layouts, compressors or {}, done
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
            change = change_of(request, self._layouts[peer], self._compressors.get(peer))
            self._contributions[peer] = Contribution(peer, request.weight, change, request.quality)

    def _finish(self) -> None:
        self._done(self._collected(dict(sorted(self._weights.items()))))

    def _collected(self, weights: dict[str, float]) -> Collected:
        return Collected(weights, tuple(self._contributions[peer] for peer in sorted(self._contributions)))


def change_of(update: pb.Update, layout: Layout, compressor: Compressor | None) -> Mapping[str, torch.Tensor]:
    """What an open update says; None: it comes in full, by name.

    Raises:
        FrameError: it is not of this layout, or holds what was never encoded.
    """
    if compressor is not None:
        return layout.tensors(compressor.decode(update.compressed))
    return codec.decode_named(update.tensors, layout.shapes)


class Sums(Open):
    """The sums that edges took the masks off: each cohort's by itself, and the sum of all, exact.

    Args:
        sums: how what silos sent is read, where every silo of the federation adds its numbers.
    """

    def __init__(self, peers: Iterable[str], sums: SumFormat, barrier: MakeBarrier, done: Done) -> None:
        super().__init__(dict.fromkeys(peers, sums.layout), barrier, done)
        self._sums = sums
        self._total_KS: Integers | None = None

    def _take(self, peer: str, request: pb.Update) -> None:
        if not request.weight:
            return
        if not request.masked:
            raise ProtocolError("this federation's updates are masked", remedy="give all parties one recipe")
        ring = self._sums.ring
        whole_KS = ring.unpack(ring.read(request.masked, self._sums.size), self._sums.size)
        if abs(whole_KS).max() > ring.most(min(request.weight, ring.silos)):
            raise FrameError(f"the sum of {peer} is beyond what so many silos can add", remedy="leave that edge out")
        if (contribution := self._sums.mean(peer, whole_KS)) is not None:
            self._contributions[peer] = contribution
            self._total_KS = whole_KS if self._total_KS is None else self._total_KS + whole_KS

    def _collected(self, weights: dict[str, float]) -> Collected:
        return replace(super()._collected(weights), total_KS=self._total_KS, sums=self._sums)


@dataclass(frozen=True)
class SumFormat:
    """How a sum of silos' numbers is read."""

    layout: Layout
    ring: Ring
    projection: Projection
    tells: int = 0
    """Numbers between the K and the S."""

    @property
    def size(self) -> int:
        """K + S, and what lies between."""
        return self.projection.size + self.tells + self.ring.digits

    def within(self, total_KS: Integers) -> float | None:
        """Which part of the silos said that the clip left their update as it was, by their sum; noise can take it
        below 0 and above 1. None if they do not say."""
        weight = self._weight(total_KS)
        if not self.tells or weight <= 0:
            return None
        return (1 + float(total_KS[self.projection.size]) / (self.ring.levels * weight)) / 2

    def mean(self, name: str, total_KS: Integers) -> Contribution | None:
        """What the silos learned whose numbers, each times its share, and at last whose shares add up to this."""
        total_K, weight = total_KS[: self.projection.size], self._weight(total_KS)
        if weight <= 0:
            return None
        mean_K = torch.from_numpy(total_K * (self.ring.range / self.ring.levels / weight))
        return Contribution(name, weight, self.layout.tensors(self.projection.lift(mean_K)))

    def _weight(self, total_KS: Integers) -> float:
        return self.ring.decode_share(total_KS[len(total_KS) - self.ring.digits :])
