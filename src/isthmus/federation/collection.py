"""Collecting a round's updates, open or under masks: from the silos that begin it to what they learned together.

Both kinds have the same life: silos contribute or are lost, and once nobody is waited for any more ``done`` gets what
there is. All calls come under the rounds' lock.

Shapes: P parameters, K numbers that cross.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from google.protobuf.message import Message

from isthmus.errors import IsthmusError, ProtocolError, RoundLostError
from isthmus.federation.compression import Compressor
from isthmus.federation.contribution import Contribution
from isthmus.federation.masking import Advert, Terms
from isthmus.federation.projections import All, Projection
from isthmus.federation.quantize import Ring, Whole
from isthmus.federation.tally import Tally
from isthmus.model.flat import Layout
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.barrier import Barrier
from isthmus.wire.channel import Answer

MakeBarrier = Callable[[Callable[[dict[str, None]], None]], Barrier[None]]


@dataclass(frozen=True)
class Collected:
    """What a round's silos contributed."""

    weights: dict[str, float]
    """Of each silo that contributed; under masks 1, or 0 for one that learned nothing: what it weighs is in the sum."""
    contributions: tuple[Contribution, ...]
    """One for each silo that learned something, or one mean of all."""


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
        compressor: reads them; None: they come in full, by name.
    """

    def __init__(
        self,
        peers: Iterable[str],
        layout: Layout,
        barrier: MakeBarrier,
        done: Done,
        *,
        compressor: Compressor | None = None,
    ) -> None:
        self._layout, self._done, self._compressor = layout, done, compressor
        self._awaited = set(peers)
        self._contributions: dict[str, Contribution] = {}
        self._barrier = barrier(lambda _: self._finish())
        self._barrier.expect(self._awaited)

    def handle(self, peer: str, request: Message) -> Answer:
        if not isinstance(request, pb.Update) or request.masked:
            raise ProtocolError("this federation's updates are open", remedy="give silo and root one recipe")
        if peer not in self._awaited:
            raise ProtocolError(f"{peer} is no participant of round {request.round}", remedy="ask for a plan")
        change = self._change(request) if request.weight else {}
        self._awaited.remove(peer)
        self._contributions[peer] = Contribution(peer, request.weight, change)
        self._barrier.arrive(peer, None)
        return _answered(pb.Accepted())

    def awaits(self, peer: str) -> bool:
        return peer in self._awaited

    def lose(self, peer: str) -> bool:
        self._awaited.discard(peer)
        self._barrier.dismiss(peer)
        return not self._awaited and not self._contributions

    def _change(self, update: pb.Update) -> Mapping[str, torch.Tensor]:
        if self._compressor is None:
            return codec.decode_named(update.tensors, self._layout.shapes)
        return self._layout.tensors(self._compressor.decode(update.compressed))

    def _finish(self) -> None:
        ordered = [self._contributions[peer] for peer in sorted(self._contributions)]
        learned = tuple(one for one in ordered if one.weight)
        self._done(Collected({one.name: one.weight for one in ordered}, learned))


class Masked:
    """The sum of all updates and nothing else. Three times all silos that are left are waited for: to deal shares of
    their secrets, to send their masked updates, and to give out the shares that take the masks off the sum.

    Args:
        adverts: the participants' keys.
        ring: of the numbers, which are each silo's change times its weight, and at last the weight.
        fewest: living silos of whom a sum may be known.
        projection: which of the change's numbers are summed; None: all.
    """

    def __init__(
        self,
        adverts: Mapping[str, Advert],
        layout: Layout,
        ring: Ring,
        barrier: MakeBarrier,
        done: Done,
        *,
        fewest: int,
        projection: Projection | None = None,
    ) -> None:
        self.terms = Terms(secrets.token_bytes(16), adverts)
        self._layout, self._ring, self._new_barrier, self._done, self._fewest = layout, ring, barrier, done, fewest
        self._projection = projection or All(layout.size)
        self._size = self._projection.size + ring.digits
        self._sealed: dict[str, dict[str, bytes]] = {}
        self._tally: Tally | None = None
        self._weights: dict[str, float] = {}
        self._waiting: dict[str, Answer] = {}
        self._due: type[Message] = pb.Deal
        self._awaited = set(adverts)
        self._lost: set[str] = set()
        self._barrier = barrier(lambda _: self._pass_on())
        self._barrier.expect(self._awaited)

    def handle(self, peer: str, request: Message) -> Answer:
        if not isinstance(request, self._due):
            if isinstance(request, (pb.Deal, pb.Update, pb.Reveal)):
                raise RoundLostError(f"{type(request).__name__} is not due any more", remedy="ask for the next plan")
            raise ProtocolError(f"{type(request).__name__} is not due", remedy="ask for a plan")
        if peer not in self._awaited:
            raise ProtocolError(f"{peer} has no more to send", remedy="ask for the next plan")
        self._take(peer, request)
        self._awaited.remove(peer)
        answer: Answer = Answer()
        self._waiting[peer] = answer
        self._barrier.arrive(peer, None)
        return answer

    def awaits(self, peer: str) -> bool:
        return peer in self._awaited or peer in self._waiting

    def lose(self, peer: str) -> bool:
        self._lost.add(peer)
        self._awaited.discard(peer)
        self._waiting.pop(peer, None)
        self._barrier.dismiss(peer)
        return not self._awaited and not self._waiting

    def _take(self, peer: str, request: Message) -> None:
        if isinstance(request, pb.Deal):
            neighbours = set(self.terms.neighbours(peer))
            if request.sealed.keys() != neighbours:
                raise ProtocolError(f"{peer} dealt to others than its neighbours", remedy="ask for the next plan")
            self._sealed[peer] = dict(request.sealed)
        elif isinstance(request, pb.Update):
            assert self._tally is not None
            if not request.masked:
                raise ProtocolError("this federation's updates are masked", remedy="give silo and root one recipe")
            self._tally.add(peer, self._ring.unpack(request.masked, self._size))
            self._weights[peer] = request.weight
        elif isinstance(request, pb.Reveal):
            assert self._tally is not None
            self._tally.reveal(peer, dict(request.shares))

    def _pass_on(self) -> None:
        """All have dealt who will: each gets what was dealt to it."""
        dealers = self._sealed.keys() - self._lost
        if len(dealers) < max(self._fewest, self.terms.threshold):
            self._fail(f"{len(dealers)} silos dealt their shares")
            return
        self._tally = Tally(self.terms, dealers, self._size)
        waiting = self._next(pb.Update, dealers, self._name_living)
        for peer, answer in waiting.items():
            sealed = {dealer: self._sealed[dealer][peer] for dealer in dealers if peer in self._sealed[dealer]}
            answer.set_result(pb.Dealt(sealed=sealed))

    def _name_living(self) -> None:
        """All masked updates are there that will be: the living are asked for their shares."""
        assert self._tally is not None
        alive = self._tally.alive
        learned = {peer: weight for peer, weight in sorted(self._weights.items()) if weight}
        if len(alive) < self._fewest:
            self._fail(f"{len(alive)} silos sent their updates")
            return
        if len(learned) < self._fewest:  # of so few no sum may be known
            self._end(Collected(learned or dict.fromkeys(sorted(alive), 0.0), ()))
            return
        living = pb.Living(alive=sorted(alive), dead=sorted(self._tally.dead))
        for answer in self._next(pb.Reveal, alive - self._lost, self._finish).values():
            answer.set_result(living)

    def _finish(self) -> None:
        assert self._tally is not None
        try:
            total = self._tally.total()
        except ProtocolError as error:
            self._fail(error.message)
            return
        self._end(Collected(dict(sorted(self._weights.items())), self._mean(total)))

    def _mean(self, total: Whole) -> tuple[Contribution, ...]:
        total_K, total_S = np.split(total, [self._projection.size])
        weight = self._ring.decode_share(total_S)
        if weight <= 0:
            return ()
        change_P = self._projection.lift(torch.from_numpy(self._ring.decode(total_K) / weight))
        return (Contribution("all", weight, self._layout.tensors(change_P)),)

    def _next(self, due: type[Message], peers: Iterable[str], fire: Callable[[], None]) -> dict[str, Answer]:
        """Wait for this of these from now on; the answers that are due to whoever has come so far."""
        waiting, self._waiting = self._waiting, {}
        self._due, self._awaited = due, set(peers)
        self._barrier = self._new_barrier(lambda _: fire())
        self._barrier.expect(self._awaited)
        return waiting

    def _end(self, collected: Collected) -> None:
        self._done(collected)
        for answer in self._waiting.values():
            answer.set_result(pb.Accepted())

    def _fail(self, reason: str) -> None:
        error = RoundLostError(f"the masked sum failed: {reason}", remedy="ask for the next plan")
        self._done(error)
        for answer in self._waiting.values():
            answer.set_exception(error)


def _answered(message: Message) -> Answer:
    answer: Answer = Answer()
    answer.set_result(message)
    return answer
