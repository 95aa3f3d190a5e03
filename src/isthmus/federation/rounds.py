"""Rounds as a state machine: gather children, ask for a plan, let them train, pass on what was collected; again, until
finished. The same for the root, whose children are silos or edges, and for every edge."""

from __future__ import annotations

import enum
import logging
import math
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

from google.protobuf.message import Message

from isthmus.errors import IdentityError, IsthmusError, ProtocolError, QuorumError, RoundLostError
from isthmus.federation.collection import Collected, Collection, Open, Sums
from isthmus.federation.masked import Masked
from isthmus.federation.planner import Planner
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT, check_named, listed
from isthmus.updates.compression import Compression, Compressor
from isthmus.updates.flat import Layout
from isthmus.updates.masking import Advert, check_usable
from isthmus.updates.sums import SumFormat
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.barrier import Barrier
from isthmus.wire.channel import Answer, answered
from isthmus.wire.identity import Identity
from isthmus.wire.patience import Heard
from isthmus.wire.sum_keys import plan_digest, signers, verify_keys
from isthmus.wire.vitals import Vitals

log = logging.getLogger(__name__)


class Phase(enum.Enum):
    GATHERING = "gathering"
    WAITING = "waiting"
    """A root over silos: for more of them, as fewer than its minimum are there."""
    ASKING = "asking"
    """An edge: for its parent's plan."""
    TRAINING = "training"
    CONCLUDING = "concluding"
    """An edge: until its parent has taken the sum."""
    FINISHED = "finished"
    FAILED = "failed"


class Aggregator(ABC):
    """A node that plans rounds and takes updates: the root, or an edge. Implements ``wire.channel.Service``."""

    heard: Heard
    """The children that it hears."""

    def handle(self, peer: str, request: Message) -> Answer:
        self.heard.note(peer)
        if isinstance(request, (pb.Update, pb.Deal, pb.Agree, pb.Reveal)):
            return self.contribute(peer, request)
        if isinstance(request, pb.Ready):
            return self.ready(peer, request)
        if isinstance(request, pb.Current):
            return self.current(peer)
        if isinstance(request, pb.Ping):
            return answered(pb.Pong())
        raise ProtocolError(f"no aggregator answers {type(request).__name__}", remedy="ask the trunk")

    @abstractmethod
    def ready(self, peer: str, request: pb.Ready) -> Answer:
        """Answer a child that asks for work with its plan, once there is one."""

    @abstractmethod
    def contribute(self, peer: str, request: pb.Update | pb.Deal | pb.Agree | pb.Reveal) -> Answer:
        """Take a child's message to the round that it trains in."""

    @abstractmethod
    def current(self, peer: str = "") -> Answer:
        """``pb.Adapters``: the shared adapters after the last finished round, for a child that does not train."""

    @abstractmethod
    def end_early(self) -> None:
        """The planner has become ``over``: drop the round under way, and tell every child that asks."""

    @abstractmethod
    def vitals(self) -> Vitals:
        """Implements ``wire.vitals.Watched``."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether a child has been told that no round is left."""


class Rounds(Aggregator):
    """Synchronous rounds. Every request changes the phase under one lock; a round is on disk before it is answered.

    A root over silos that has fewer than its minimum waits until enough have asked. In a tree the silos that ask get
    ``QuorumError``, so that they can turn to a sibling, and the node gathers again. Each change is logged.

    Args:
        planner: plans rounds, and takes what was collected in them.
        name: the node's.
        identity: the process's, to verify the keys that silos sign; None: they are passed on without that, and the
            silos alone verify them.
    """

    def __init__(self, recipe: Recipe, planner: Planner, name: str = ROOT, identity: Identity | None = None) -> None:
        self._identity = identity
        self.heard = Heard(recipe.waits.silence if identity else math.inf)
        self.phase = Phase.GATHERING
        self._error: IsthmusError | None = None
        """The error that every child gets once the phase is ``FAILED``."""
        self._planner = planner
        self._node = recipe.tree.node(name)
        self._waits = name == ROOT and recipe.tree.leaf(name)
        """Whether this node waits where children are too few."""
        self._masks, self._compression = recipe.federation.secure.masks, Compression.of(recipe)
        self._offers_keys = self._masks and recipe.tree.leaf(name)
        self._silos = frozenset(silo.name for silo in recipe.silo)
        self._below = {child: recipe.tree.below(child) for child in (*self._node.children, *self._node.wards)}
        """By child, the silos that may be below it."""
        self._heaviest = {child: recipe.most_weight(silos) for child, silos in self._below.items()}
        self._lock = threading.RLock()
        self._waiting: dict[str, Answer] = {}
        self._barred: set[str] = set()
        """Silos whose shares are of no secret: every masked sum with them would be lost."""
        self._asked: dict[str, pb.Ready] = {}
        """By child, its last ``Ready``."""
        self._held: Future[None] | None = None
        """Done once no round is under way, where none is to begin."""
        self._round = 0
        """The number of the round under way; 0 before the first."""
        self._began = 0.0
        """Monotonic time at which it began."""
        self._last = pb.Plan()
        """The plan that every child gets once the federation is finished."""
        self._collection: Collection | None = None
        """The updates of the round under way."""
        self._turn = 0
        """Counts phases: an answer or a barrier of an earlier phase is ignored."""
        self._gathering: Barrier[None] = self._barrier(lambda _: None)
        """The children that the next round waits for."""
        if self._masks:
            self._check_room()
        self._gather(self._node.children)

    def ready(self, peer: str, request: pb.Ready) -> Answer:
        """A child asks for work; answered with a plan once the next round begins, or the federation is over.

        Raises:
            ProtocolError: it is no child of this node's, or names silos that cannot be below it; or updates are to be
                masked, and it offers no keys, or some with which the others could not go on, or a sum was lost by it.
            IdentityError: it has not signed its keys. The other silos would refuse them, and the round with them.
        """
        if peer not in (*self._node.children, *self._node.wards):
            raise ProtocolError(f"{peer} is no child of {self._node.name}", remedy="give all parties one recipe")
        if peer in self._barred:
            raise ProtocolError(
                f"{peer} dealt shares of no secret, by which a sum was lost: no other is made with it",
                remedy="run the released program there, then start this aggregator again",
            )
        check_named(peer, request.silos, self._below[peer])
        if self._offers_keys and not request.HasField("keys"):
            raise ProtocolError(f"{peer} offers no keys", remedy="give all parties one recipe")
        if self._identity is not None and request.HasField("keys"):
            self._identity = self._identity.renewed()
            verify_keys(self._identity, peer, request.keys)
        if self._offers_keys:
            for public in (request.keys.sealing, request.keys.masking):
                check_usable(public)
        answer: Answer = Answer()
        with self._lock:
            self._planner.meet(peer, request.run)
            self._asked[peer] = request
            self._waiting[peer] = answer
            if self._collection is not None and self._collection.awaits(peer):
                self._lose(self._collection, peer)
            self._advance()
        return answer

    def contribute(self, peer: str, request: pb.Update | pb.Deal | pb.Agree | pb.Reveal) -> Answer:
        """A child's message to the round under way.

        Raises:
            RoundLostError: no such round is under way, or it has gone on without the child.
            ProtocolError: the child is no participant or has contributed already.
            FrameError: other tensors than the shared ones.
        """
        with self._lock:
            if self._collection is None or request.round != self._round:
                raise RoundLostError(f"an update for round {request.round}", remedy="ask for the next plan")
            return self._collection.handle(peer, request)

    def current(self, peer: str = "") -> Answer:
        with self._lock:
            return self._planner.current(peer)

    def hold(self) -> Future[None]:
        """From now on no round begins; done once none is under way. Who asks for one is not answered."""
        with self._lock:
            self._held = self._held or Future()
            if self.phase in (Phase.GATHERING, Phase.WAITING, Phase.FINISHED, Phase.FAILED):
                self._settle_held()
            return self._held

    def end_early(self) -> None:
        with self._lock:
            if self.phase in (Phase.GATHERING, Phase.WAITING, Phase.TRAINING):  # the others end by themselves, and soon
                self._gather(self._node.children)

    def _settle_held(self) -> None:
        if self._held is not None and not self._held.done():
            self._held.set_result(None)

    def vitals(self) -> Vitals:
        """Implements ``wire.vitals.Watched``; takes no lock, which a round's arithmetic may hold for long."""
        phase, collection, children = self.phase, self._collection, {*self._node.children, *self._node.wards}
        missing: set[str] = set()
        if collection is not None:
            missing = {child for child in children if collection.awaits(child)}
        elif phase is Phase.GATHERING:
            missing = set(self._gathering.expected) - set(self._waiting)
        elif phase is Phase.WAITING:
            missing = set(self._node.children) - set(self._waiting)
        failure = "" if self._error is None else self._error.message
        completed = max(self._planner.completed, self._last.completed)  # of a new edge: by its parent's word
        return Vitals(phase.value, completed, failure, tuple(sorted(missing)))

    @property
    def finished(self) -> bool:
        return self.phase is Phase.FINISHED

    def _advance(self) -> None:
        """Answer the children that wait, as far as the phase allows."""
        with self._lock:
            if self.phase is Phase.GATHERING and self._planner.over:
                self._when_there(lambda: self._planner.plan(()), lambda plan: self._begin([], plan))
            elif self.phase is Phase.FINISHED:
                self._answer(list(self._waiting), self._last)
            elif self.phase is Phase.FAILED:
                assert self._error is not None
                self._give_up(self._error)
            elif self.phase is Phase.WAITING:
                self._ask_if_enough()
            elif self.phase is Phase.GATHERING:
                self._gathering.expect(self._gathering.expected | self._waiting.keys())
                for peer in list(self._waiting):
                    self._gathering.arrive(peer, None)

    def _gather(self, peers: Iterable[str]) -> None:
        """Gather these children, and any other that asks, for the next round."""
        self.phase, self._collection = Phase.GATHERING, None
        self._gathering = self._barrier(lambda arrived: self._ask(sorted(arrived)))
        expected = set(peers) - self._barred
        self._log("gathering; expected: %s", listed(expected))
        self._gathering.expect(expected)
        self._advance()

    def _ask(self, present: list[str]) -> None:
        if self._held is not None:
            self._settle_held()
            return
        if len(present) < self._node.minimum:
            self._miss(present)
            return
        self.phase = Phase.ASKING
        silos = {silo for peer in present for silo in (self._asked[peer].silos or [peer])}
        self._when_there(lambda: self._planner.plan(silos), lambda plan: self._begin(present, plan))

    def _begin(self, participants: list[str], plan: pb.Plan) -> None:
        if not plan.round:
            self.phase, self._last = Phase.FINISHED, plan
            self._log("finished after %d rounds", plan.completed)
            self._advance()
            return
        self.phase, self._round, self._began = Phase.TRAINING, plan.round, time.monotonic()
        missing = self._missing(participants)
        fields = {"round": plan.round, "present": participants, "missing": missing}
        self._log("round %d begins with %s; missing: %s", plan.round, listed(participants), missing, fields=fields)
        if self._offers_keys:
            keys = {peer: self._asked[peer].keys for peer in participants}
            plan.sum = secrets.token_bytes(16)
            for peer, offered in keys.items():
                plan.keys[peer].CopyFrom(offered)
            self._collection = self._masked(keys, plan)
        elif self._masks:
            counts = {peer: len(self._asked[peer].silos) or 1 for peer in participants}
            known = {count: self._format(participants[0], plan.round, count, plan.clip) for count in {*counts.values()}}
            formats = {peer: known[count] for peer, count in counts.items()}
            self._collection = Sums(formats, self._barrier, self._end)
        else:
            layouts = {peer: self._planner.layout(peer, plan.round) for peer in participants}
            compressors = self._compressors(layouts, plan.round)
            self._collection = Open(layouts, self._barrier, self._end, compressors=compressors, heaviest=self._heaviest)
        self._answer(participants, plan)

    def _answer(self, peers: Iterable[str], plan: pb.Plan) -> None:
        for peer in peers:
            self._waiting.pop(peer).set_result(self._planner.own(plan, peer))

    def _masked(self, keys: Mapping[str, pb.SumKeys], plan: pb.Plan) -> Masked:
        adverts = {peer: Advert(one.sealing, one.masking, one.commitment) for peer, one in keys.items()}
        sums = self._format(next(iter(keys)), plan.round, len(keys), plan.clip)
        context = plan_digest(self._planner.own(plan, next(iter(keys))))  # under masks all children get the same
        fewest = self._node.minimum
        return Masked(
            adverts, sums, self._barrier, self._end, context=context, fewest=fewest, verify=self._verify_survivors
        )

    def _verify_survivors(self, peer: str, signature: bytes, digest: bytes, living: pb.Survivors) -> None:
        keys = {peer: self._asked[peer].keys}
        if self._identity and not signers(self._identity, keys, {peer: signature}, digest, living, enough=1):
            raise IdentityError(f"{peer} did not sign these survivors", remedy="ask for the next plan")

    def _format(self, peer: str, round: int, silos: int, clip: float = 0.0) -> SumFormat:
        """The format of a sum of so many silos' numbers, this child's among them."""
        return self._compression.sum_format(self._planner.layout(peer, round), round, silos, clip)

    def _check_room(self) -> None:
        """Raise at the start what would otherwise be raised in a round.

        Raises:
            RecipeError: the sum of the silos' numbers and noise that this node makes, or reads, does not fit into the
                ring.
        """
        most = len(self._below) if self._offers_keys else max(map(len, self._below.values()))
        for round in (1, 2):  # LoRA's factors may take turns
            self._format(self._node.children[0], round, most)

    def _compressors(self, layouts: Mapping[str, Layout], round: int) -> dict[str, Compressor]:
        """The compressors of the silos' updates in this round; edges' are not compressed."""
        sizes = {layout.size for layout in layouts.values()}
        known = {size: self._compression.compressor(size, round) for size in sizes}
        found = {peer: known[layouts[peer].size] for peer in layouts.keys() & self._silos}
        return {peer: compressor for peer, compressor in found.items() if compressor is not None}

    def _lose(self, collection: Collection, peer: str) -> None:
        """A participant asks instead of contributing: its process is new, and what it trained is gone."""
        if collection.lose(peer):
            self._gather(self._waiting)

    def _end(self, collected: Collected | IsthmusError) -> None:
        if isinstance(
            collected, IsthmusError
        ):  # the sum is not known: the same round again, with the children that ask
            self._log("round %d is lost: %s", self._round, collected.message, level=logging.WARNING)
            self._bar(self._collection.frauds if isinstance(self._collection, Masked) else set())
            self._gather(self._node.children)
            return
        if len(collected.weights) < self._node.minimum:
            if self._offers_keys:  # all are there, but too few have learned something: again it would be no other
                self._give_up(self._too_few(len(collected.weights)))
            else:
                self._miss(sorted(collected.weights))
            return
        self._log("round %d: %s contributed", self._round, listed(collected.weights))
        self.phase, self._collection = Phase.CONCLUDING, None
        # the next round does not wait again for a child that sent nothing in this one
        self._when_there(
            lambda: self._planner.conclude(self._round, collected), lambda _: self._go_on(collected.weights)
        )

    def _go_on(self, contributed: Iterable[str]) -> None:
        """The round is saved: gather for the next one."""
        seconds = round(time.monotonic() - self._began, 3)
        fields = {"round": self._round, "seconds": seconds}
        self._log("round %d is saved, %.1f s after it began", self._round, seconds, fields=fields)
        self._gather(contributed)

    def _bar(self, frauds: set[str]) -> None:
        if frauds:
            self._log("%s dealt shares of no secret and is left out", listed(frauds), level=logging.ERROR)
            self._barred |= frauds

    def _when_there(self, ask: Callable[[], Answer], go_on: Callable[[pb.Plan], None]) -> None:
        """Go on with the planner's answer, unless the phase has ended by then. A round that is lost begins again."""
        self._turn += 1
        turn = self._turn

        def receive(answer: Answer) -> None:
            with self._lock:
                if turn != self._turn:
                    return
                error = answer.exception()
                if isinstance(error, RoundLostError):
                    self._log("round %d is lost: %s", self._round, error.message, level=logging.WARNING)
                    self._gather(self._node.children)
                elif isinstance(error, QuorumError) and self._node.name != ROOT:
                    self._turn_away(error)
                elif isinstance(error, IsthmusError):
                    self._give_up(error)
                else:
                    go_on(answer.result())  # type: ignore[arg-type]

        try:
            answer = ask()
        except IsthmusError as error:
            self._give_up(error)
        else:
            answer.add_done_callback(receive)

    def _barrier(self, fire: Callable[[dict[str, None]], None]) -> Barrier[None]:
        """A barrier for the phase that begins; after the end of the phase it fires in vain."""
        self._turn += 1
        turn = self._turn

        def fire_in_turn(arrived: dict[str, None]) -> None:
            with self._lock:
                if turn == self._turn:
                    fire(arrived)

        return Barrier(self._node.patience, fire_in_turn, self.heard)

    def _miss(self, present: list[str]) -> None:
        """Fewer than the minimum are left: wait for more, or send those that are there away and gather again."""
        if not self._waits:
            self._turn_away(self._too_few(len(present)))
            return
        message = "%d silos are left, the recipe needs %d; waiting; missing: %s"
        self._log(message, len(present), self._node.minimum, self._missing(present), level=logging.WARNING)
        self.phase, self._collection = Phase.WAITING, None
        self._turn += 1
        self._ask_if_enough()

    def _ask_if_enough(self) -> None:
        if len(self._waiting) >= self._node.minimum:
            self._ask(sorted(self._waiting))
        else:
            self._log("waiting for silos; missing: %s", self._missing(self._waiting))

    def _turn_away(self, error: IsthmusError) -> None:
        """Answer those that wait with this error, and gather again."""
        self._log("%s; gathering again", error.message, level=logging.WARNING)
        waiting, self._waiting = self._waiting, {}
        self._gather(self._node.children)
        for answer in waiting.values():
            answer.set_exception(error)

    def _too_few(self, present: int) -> QuorumError:
        return QuorumError(
            f"{present} silos are left, the recipe needs {self._node.minimum}",
            remedy="start the missing silos, then continue with 'isthmus run --resume'",
        )

    def _missing(self, present: Iterable[str]) -> str:
        return listed(set(self._node.children) - set(present))

    def _log(
        self, message: str, *values: object, level: int = logging.INFO, fields: Mapping[str, object] | None = None
    ) -> None:
        log.log(level, f"%s: {message}", self._node.name, *values, extra=fields)

    def _give_up(self, error: IsthmusError) -> None:
        with self._lock:
            if self.phase is not Phase.FAILED:
                self._log("failed: %s", error.message, level=logging.ERROR)
            self.phase, self._collection, self._error = Phase.FAILED, None, error
            self._turn += 1
            waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer.set_exception(error)
