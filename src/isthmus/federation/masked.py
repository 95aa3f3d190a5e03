"""Collecting the sum of a round's masked updates.

Shapes: K numbers that cross, S digits of a share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from google.protobuf.message import Message

from isthmus.errors import ProtocolError, RoundLostError
from isthmus.federation.collection import Collected, Done, MakeBarrier
from isthmus.federation.contribution import Contribution
from isthmus.updates.masking import Advert, Terms
from isthmus.updates.sums import SumFormat
from isthmus.updates.unmasking import Unmasking
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer

log = logging.getLogger(__name__)
Verify = Callable[[str, bytes, bytes, pb.Survivors], None]
"""Raises unless this silo made this signature of the terms with this digest and of these survivors."""


class Masked:
    """The sum of all updates, and no single one.

    The round has four steps, each of which waits for all silos that are left: they send shares of their secrets, then
    their masked updates, then their signatures of whose updates came, then the shares that unmask the sum.

    Args:
        adverts: the participants' public keys, by name.
        sums: the format of the sum.
        context: digest of the plan that the participants get, from which their masks follow.
        fewest: living silos that a sum needs before it may be known.
        verify: checks a silo's signature before others get it: a false one would end the round for them.
    """

    def __init__(
        self,
        adverts: Mapping[str, Advert],
        sums: SumFormat,
        barrier: MakeBarrier,
        done: Done,
        *,
        context: bytes,
        fewest: int,
        verify: Verify,
    ) -> None:
        self.terms = Terms(context, adverts)
        self._sums, self._new_barrier, self._done, self._fewest = sums, barrier, done, fewest
        self._verify, self._living = verify, pb.Survivors()
        self._sealed: dict[str, dict[str, bytes]] = {}
        self._commitments: dict[str, dict[str, bytes]] = {}
        self._signatures: dict[str, bytes] = {}
        self._unmasking: Unmasking | None = None
        self.frauds: set[str] = set()
        """Once the round has failed, the silos that dealt shares of no secret: with them the next one would, too."""
        self._weights: dict[str, float] = {}
        self._waiting: dict[str, Answer] = {}
        self._expected: type[Message] = pb.Deal
        self._awaited = set(adverts)
        self._lost: set[str] = set()
        self._barrier = barrier(lambda _: self._pass_on())
        self._barrier.expect(self._awaited)

    def handle(self, peer: str, request: Message) -> Answer:
        if not isinstance(request, self._expected):
            if isinstance(request, (pb.Deal, pb.Update, pb.Agree, pb.Reveal)):
                raise RoundLostError(f"{type(request).__name__} comes too late", remedy="ask for the next plan")
            raise ProtocolError(f"{type(request).__name__} is not expected", remedy="ask for a plan")
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
            if request.commitments.keys() != {peer, *neighbours}:
                raise ProtocolError(f"{peer} did not commit itself to its shares", remedy="ask for the next plan")
            self._sealed[peer], self._commitments[peer] = dict(request.sealed), dict(request.commitments)
        elif isinstance(request, pb.Update):
            assert self._unmasking is not None
            if not (masked := request.masked):
                raise ProtocolError("this federation's updates are masked", remedy="give silo and root one recipe")
            self._unmasking.add(peer, self._sums.ring.read(masked, self._sums.size))
            self._weights[peer] = 1.0 if request.learned else 0.0
        elif isinstance(request, pb.Agree):
            self._verify(peer, request.signature, self.terms.digest, self._living)
            self._signatures[peer] = request.signature
        elif isinstance(request, pb.Reveal):
            assert self._unmasking is not None
            self._unmasking.reveal(peer, dict(request.shares))
            if owners := self._unmasking.liars.get(peer):
                log.warning("%s revealed false shares of %s: they are left out", peer, ", ".join(sorted(owners)))

    def _pass_on(self) -> None:
        """No more silos will send shares: each that did gets the shares that were sealed for it."""
        dealers = self._sealed.keys() - self._lost
        if len(dealers) < max(self._fewest, self.terms.quorum):
            self._fail(f"{len(dealers)} silos dealt their shares")
            return
        commitments = {dealer: self._commitments[dealer] for dealer in dealers}
        self._unmasking = Unmasking(self.terms, commitments, self._sums.ring.words(self._sums.size))
        waiting = self._next(pb.Update, dealers, self._name_living)
        for peer, answer in waiting.items():
            sealed = {dealer: self._sealed[dealer][peer] for dealer in dealers if peer in self._sealed[dealer]}
            committed = {dealer: self._commitments[dealer][peer] for dealer in sealed}
            answer.set_result(pb.Dealt(sealed=sealed, commitments=committed))

    def _name_living(self) -> None:
        """No more masked updates will come: the silos that sent theirs are asked for their shares."""
        assert self._unmasking is not None
        alive = self._unmasking.alive
        learned = {peer: weight for peer, weight in sorted(self._weights.items()) if weight}
        if len(alive) < max(self._fewest, self.terms.quorum):
            self._fail(f"{len(alive)} silos sent their updates")
            return
        if len(learned) < self._fewest:  # of so few no sum may be known
            self._end(Collected(learned or dict.fromkeys(sorted(alive), 0.0), ()))
            return
        self._living = living = pb.Survivors(alive=sorted(alive), dropped=sorted(self._unmasking.dead))
        for answer in self._next(pb.Agree, alive - self._lost, self._pass_signatures).values():
            answer.set_result(living)

    def _pass_signatures(self) -> None:
        """No more signatures of the survivors will come: each silo gets all others', to compare with its own."""
        signed = self._signatures.keys() - self._lost
        if len(signed) < max(self._fewest, self.terms.quorum):
            self._fail(f"{len(signed)} silos signed who is in it")
            return
        agreed = pb.Agreed(signatures=self._signatures)
        for answer in self._next(pb.Reveal, signed, self._finish).values():
            answer.set_result(agreed)

    def _finish(self) -> None:
        assert self._unmasking is not None
        try:
            total_KS = self._sums.ring.unpack(self._unmasking.total(), self._sums.size)
        except ProtocolError as error:
            self.frauds = self._unmasking.frauds()
            liars = f"; false shares came from {', '.join(sorted(who))}" if (who := self._unmasking.liars) else ""
            self._fail(error.message + liars)
            return
        weights, mean = dict(sorted(self._weights.items())), self._sums.mean(total_KS)
        if mean is None:
            self._end(Collected(weights, ()))
        else:
            self._end(Collected(weights, (Contribution("all", *mean),), total_KS, sums=self._sums))

    def _next(self, expected: type[Message], peers: Iterable[str], fire: Callable[[], None]) -> dict[str, Answer]:
        """Wait for messages of this type from these silos; returns the unanswered requests of the step before."""
        waiting, self._waiting = self._waiting, {}
        self._expected, self._awaited = expected, set(peers)
        self._barrier = self._new_barrier(lambda _: fire())
        self._barrier.expect(self._awaited)
        return waiting

    def _end(self, collected: Collected) -> None:
        self._done(collected)
        liars = {} if self._unmasking is None else self._unmasking.liars
        for peer, answer in self._waiting.items():
            if owners := liars.get(peer):
                false = f"{peer} revealed false shares of {', '.join(sorted(owners))}"
                answer.set_exception(ProtocolError(false, remedy="reveal the shares that were dealt"))
            else:
                answer.set_result(pb.Accepted())

    def _fail(self, reason: str) -> None:
        error = RoundLostError(f"the masked sum failed: {reason}", remedy="ask for the next plan")
        self._done(error)
        for answer in self._waiting.values():
            answer.set_exception(error)
