"""Asynchronous rounds: updates go into a buffer, and whenever it is full the root makes a new version of the tensors.

FedBuff (Nguyen et al. 2022), for silos of unlike speed. A round is a version of the shared tensors: the update of a
silo that began with version v says round v + 1, and may come when the newest is version n. It is n - v versions stale.
Its change (new minus old, where old is version v) is then scaled by 1/√(1 + n - v) and added to version n with the
others of the buffer, each by its share of their weights. The shares are not scaled up again: a buffer of stale updates
makes a smaller step.
"""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass

from google.protobuf.message import Message

from isthmus.errors import IsthmusError, ProtocolError, RoundLostError
from isthmus.federation.collection import Collected, change_of, check_claim
from isthmus.federation.contribution import Contribution
from isthmus.federation.planner import RootPlanner
from isthmus.federation.rounds import Aggregator
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT, check_named, listed
from isthmus.updates.compression import Compression
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, answered
from isthmus.wire.identity import Identity
from isthmus.wire.patience import Heard, Patience
from isthmus.wire.published import sign_version
from isthmus.wire.vitals import Vitals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """One silo's update in the buffer."""

    weight: float
    staleness: int
    """Versions that came out since the silo began."""
    contribution: Contribution | None
    """Scaled; None: the silo learned nothing."""


class Buffered(Aggregator):
    """Asynchronous rounds at the root, in place of ``Rounds``: the same requests, under one lock, but no barrier.

    A silo gets the newest version whenever it asks, unless its update is in the buffer: then it gets the version that
    comes of it. So no silo is in a version twice, nor trains on one twice, however fast it is; and nobody waits for one
    that is slow as long as ``federation.asynchronous.buffer`` others are there. A buffer that is not full after the
    root's patience makes a version as soon as it holds the root's minimum. Each version is logged.

    The buffer is not on disk. A root that starts again has the last version, and no silo has an update in it: who asks
    trains again, and an update that was begun before is refused by name.

    Args:
        identity: of the process, which signs every version that a silo gets, for the trunk; None: all parties are in
            this process, without certificates, and nothing is signed.
    """

    def __init__(self, recipe: Recipe, planner: RootPlanner, identity: Identity | None = None) -> None:
        assert recipe.federation.asynchronous.buffer is not None
        self._size, self._oldest = recipe.federation.asynchronous.buffer, recipe.federation.asynchronous.staleness
        self.heard = Heard(recipe.waits.silence if identity else math.inf)
        self._compression = Compression.of(recipe)
        self._node = recipe.tree.node(ROOT)
        self._heaviest = {silo: recipe.most_weight([silo]) for silo in self._node.children}
        self._planner, self._identity = planner, identity
        self._runs: dict[str, str] = {}
        """By silo, the name of its trunk's run, as it said last."""
        self._lock = threading.RLock()
        self._training: dict[str, int] = {}
        """The round of each silo that has a plan."""
        self._buffer: dict[str, Held] = {}
        self._clock: Patience | None = None
        """Ends the wait for a full buffer; runs from the buffer's first update on."""
        self._late = False
        """Whether patience has ended with fewer than the minimum in the buffer: that many are enough now."""
        self._waiting: dict[str, Answer] = {}
        self._error: IsthmusError | None = None
        """The error that ended the rounds; every silo that asks gets it."""

    def ready(self, peer: str, request: pb.Ready) -> Answer:
        """A silo asks for work. What it had not sent yet is gone: it asks anew, or its process is a new one.

        Raises:
            ProtocolError: it is no silo of this federation.
        """
        if peer not in self._node.children:
            raise ProtocolError(f"{peer} is no child of {self._node.name}", remedy="give all parties one recipe")
        check_named(peer, request.silos, (peer,))
        answer: Answer = Answer()
        with self._lock:
            self._planner.meet(peer, request.run)
            self._runs[peer] = request.run
            self._training.pop(peer, None)
            self._waiting[peer] = answer
            self._answer()
        return answer

    def contribute(self, peer: str, request: Message) -> Answer:
        """A silo's update.

        Raises:
            RoundLostError: it is not of the plan that the silo has, or that is too old by now.
            ProtocolError: the silo's update is in the buffer already; or this is no open update, or claims too large a
                weight.
            FrameError: other tensors than the shared ones.
        """
        if not isinstance(request, pb.Update) or request.masked:
            raise ProtocolError("this federation's updates are open", remedy="give all parties one recipe")
        with self._lock:
            self._check(peer, request.round)
            self._buffer[peer] = self._held(peer, request)
            del self._training[peer]
            if len(self._buffer) == 1:
                self._start_clock()
            if len(self._buffer) >= (self._node.minimum if self._late else self._size):
                self._publish()
        return answered(pb.Accepted())

    def current(self, peer: str = "") -> Answer:
        with self._lock:
            return self._planner.current(peer)

    def end_early(self) -> None:
        with self._lock:
            self._buffer.clear()
            if self._clock is not None:
                self._clock.cancel()
            self._answer()

    def vitals(self) -> Vitals:
        """Implements ``wire.vitals.Watched``; takes no lock, which a version's arithmetic may hold for long."""
        failure = "" if self._error is None else self._error.message
        state = "failed" if failure else "finished" if self._planner.over else "training"
        return Vitals(state, self._planner.completed, failure, gauges={"root_buffered_updates": len(self._buffer)})

    @property
    def finished(self) -> bool:
        return self._planner.over

    def _check(self, peer: str, round: int) -> None:
        if peer in self._buffer:
            raise ProtocolError(f"{peer} has contributed to the next version", remedy="ask for a plan")
        if self._error is not None or self._planner.over or round != self._training.get(peer):
            raise RoundLostError(f"an update for round {round}", remedy="ask for the next plan")
        if (staleness := self._staleness(round)) > self._oldest:
            del self._training[peer]
            raise RoundLostError(
                f"{peer} began {staleness} versions ago, the recipe allows {self._oldest}",
                remedy="ask for the next plan; or give this silo fewer steps, "
                "or raise federation.asynchronous.staleness",
            )

    def _staleness(self, round: int) -> int:
        return self._planner.completed - (round - 1)

    def _held(self, peer: str, update: pb.Update) -> Held:
        staleness = self._staleness(update.round)
        check_claim(peer, update.weight, self._heaviest[peer])
        if not update.weight:
            return Held(0.0, staleness, None)
        layout = self._planner.layout(peer, update.round)
        change = change_of(update, layout, self._compression.compressor(layout.size, update.round))
        scale = 1 / math.sqrt(1 + staleness)
        scaled = {name: scale * tensor for name, tensor in change.items()}
        return Held(update.weight, staleness, Contribution(peer, update.weight, scaled))

    def _publish(self) -> None:
        """Make a version of what is in the buffer, on disk before anyone hears of it."""
        assert self._clock is not None
        self._clock.cancel()
        self._late = False
        held, self._buffer = dict(sorted(self._buffer.items())), {}
        collected = Collected(
            weights={peer: one.weight for peer, one in held.items()},
            contributions=tuple(one.contribution for one in held.values() if one.contribution is not None),
            staleness={peer: one.staleness for peer, one in held.items()},
        )
        try:
            self._planner.conclude(self._planner.completed + 1, collected)
            log.info("%s: version %d, of %s", ROOT, self._planner.completed, listed(held))
        except IsthmusError as error:
            log.error("%s: failed: %s", ROOT, error.message)
            self._error = error
        self._answer()

    def _answer(self) -> None:
        """To all that wait and have nothing in the buffer: the newest version."""
        for peer in [peer for peer in self._waiting if peer not in self._buffer]:
            answer = self._waiting.pop(peer)
            if self._error is not None:
                answer.set_exception(self._error)
                continue
            plan = self._planner.next([peer])
            if plan.round:
                self._training[peer] = plan.round
            own = self._planner.own(plan, peer)
            if self._identity is not None:
                self._identity = self._identity.renewed()
                own.published.CopyFrom(sign_version(self._identity, self._runs[peer], own.completed))
            answer.set_result(own)

    def _start_clock(self) -> None:
        version = self._planner.completed
        self._clock = Patience(
            self._node.patience, lambda: self._lose_patience(version), lambda: list(self._waiting), self.heard
        )

    def _lose_patience(self, version: int) -> None:
        """The buffer is not full in time: what is in it is enough, or the first updates that make up the minimum."""
        with self._lock:
            if version != self._planner.completed or self._error is not None:
                return
            if len(self._buffer) >= self._node.minimum:
                self._publish()
                return
            self._late = True
            log.warning(
                "%s: %d updates came in %g seconds, a version takes %d; waiting; missing: %s",
                ROOT,
                len(self._buffer),
                self._node.patience,
                self._node.minimum,
                listed(set(self._node.children) - self._buffer.keys()),
            )
