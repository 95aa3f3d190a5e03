"""Collecting a round's updates from the silos or edges that take part in it.

Every kind of collection goes the same way: children contribute or are lost, and once no child is waited for any more
``done`` gets what was collected. All calls come under the rounds' lock.

Shapes: K numbers that cross of an update, S digits of a share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from google.protobuf.message import Message

from isthmus.errors import FrameError, IsthmusError, ProtocolError
from isthmus.federation.contribution import Contribution
from isthmus.updates.compression import Compressor
from isthmus.updates.flat import Layout
from isthmus.updates.quantize import Integers
from isthmus.updates.sums import SumFormat
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.barrier import Barrier
from isthmus.wire.channel import Answer, answered

MakeBarrier = Callable[[Callable[[dict[str, None]], None]], Barrier[None]]


@dataclass(frozen=True)
class Collected:
    """A round's contributions, and who made them."""

    weights: dict[str, float]
    """By child that contributed, its weight. Under masks 1 for a silo that learned something and 0 for another, since
    its weight is in the sum; and for an edge the number of silos in its sum."""
    contributions: tuple[Contribution, ...]
    """One for each silo or edge that learned something, or one mean of all."""
    total_KS: Integers | None = None
    """Under masks the sum of all silos' numbers, those of their shares last; None if no silo learned anything."""
    staleness: dict[str, int] | None = None
    """By silo, the versions that came out since it began; None: the rounds wait for all."""
    sums: SumFormat | None = None
    """The format of ``total_KS``."""


Done = Callable[[Collected | IsthmusError], None]
"""Takes what was collected; or an error, where the updates came but their sum cannot be known."""


class Collection(Protocol):
    """One round's updates."""

    def handle(self, peer: str, request: Message) -> Answer:
        """A participant's message.

        Raises:
            RoundLostError: the round has gone on without the silo.
            ProtocolError, FrameError: the message is not expected, or not of the expected kind.
        """
        ...

    def awaits(self, peer: str) -> bool:
        """Whether this child still takes part in the round."""
        ...

    def lose(self, peer: str) -> bool:
        """This child has a new process: do not wait for it. True if no child is left and nothing was contributed."""
        ...


class Open:
    """Updates that the aggregator sees one by one.

    Args:
        layouts: of the participants' updates, by participant.
        compressors: decode the updates of the participants that compress theirs; the others' come in full, by name.
        heaviest: by participant, the largest weight that it may claim; the others may claim any.
    """

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        barrier: MakeBarrier,
        done: Done,
        *,
        compressors: Mapping[str, Compressor] | None = None,
        heaviest: Mapping[str, float] | None = None,
    ) -> None:
        self._layouts, self._compressors, self._done = layouts, compressors or {}, done
        self._heaviest = heaviest or {}
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
        self._weights[peer] = self._weight(request)
        self._barrier.arrive(peer, None)
        return answered(pb.Accepted())

    def awaits(self, peer: str) -> bool:
        return peer in self._awaited

    def lose(self, peer: str) -> bool:
        self._awaited.discard(peer)
        self._barrier.dismiss(peer)
        return not self._awaited and not self._weights

    def _weight(self, request: pb.Update) -> float:
        return request.weight

    def _take(self, peer: str, request: pb.Update) -> None:
        if request.masked:
            raise ProtocolError("this federation's updates are open", remedy="give all parties one recipe")
        check_claim(peer, request.weight, self._heaviest.get(peer, math.inf))
        if request.weight:
            change = change_of(request, self._layouts[peer], self._compressors.get(peer))
            self._contributions[peer] = Contribution(peer, request.weight, change, request.quality)

    def _finish(self) -> None:
        self._done(self._collected(dict(sorted(self._weights.items()))))

    def _collected(self, weights: dict[str, float]) -> Collected:
        return Collected(weights, tuple(self._contributions[peer] for peer in sorted(self._contributions)))


def check_claim(peer: str, weight: float, most: float) -> None:
    """Check that an open update weighs no more than the recipe lets it.

    Raises:
        ProtocolError: it weighs more.
    """
    if weight > most:
        raise ProtocolError(
            f"{peer} claims the weight {weight:g} for its update; by the recipe it is {most:g} at most",
            remedy="claim the tokens of the round's answers; update isthmus on both sides",
        )


def change_of(update: pb.Update, layout: Layout, compressor: Compressor | None) -> Mapping[str, torch.Tensor]:
    """An open update's change, by name.

    Args:
        compressor: decodes it; None: it comes in full, by name.

    Raises:
        FrameError: it is not of this layout, or holds bytes that were never encoded.
    """
    if compressor is not None:
        return layout.tensors(compressor.decode(update.compressed))
    return codec.decode_named(update.tensors, layout.shapes)


class Sums(Open):
    """Sums that edges have unmasked: each cohort's, and the exact sum of all.

    Args:
        formats: by participant, that of a sum to which each silo that it named adds its numbers.
    """

    def __init__(self, formats: Mapping[str, SumFormat], barrier: MakeBarrier, done: Done) -> None:
        super().__init__({peer: one.layout for peer, one in formats.items()}, barrier, done)
        self._formats = formats
        self._total_KS: Integers | None = None

    def _weight(self, request: pb.Update) -> float:
        return float(request.silos)

    def _take(self, peer: str, request: pb.Update) -> None:
        if request.weight or (request.silos and not request.masked):
            raise ProtocolError("this federation's updates are masked", remedy="give all parties one recipe")
        if not request.silos:
            return
        sums = self._formats[peer]
        if request.silos > sums.ring.silos:
            raise ProtocolError(
                f"{peer} claims {request.silos} silos for its sum, it has named {sums.ring.silos}",
                remedy="leave that edge out",
            )
        whole_KS = sums.ring.unpack(sums.ring.read(request.masked, sums.size), sums.size)
        if abs(whole_KS).max() > sums.ring.most(request.silos):
            raise FrameError(f"the sum of {peer} is beyond what so many silos can add", remedy="leave that edge out")
        if (mean := sums.mean(whole_KS)) is not None:
            self._contributions[peer] = Contribution(peer, *mean)
            self._total_KS = whole_KS if self._total_KS is None else self._total_KS + whole_KS

    def _collected(self, weights: dict[str, float]) -> Collected:
        some = next(iter(self._formats.values()))  # they differ in width alone
        return replace(super()._collected(weights), total_KS=self._total_KS, sums=some)
