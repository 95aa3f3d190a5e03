"""Synchronous rounds and optimizer steps on the trunk: silos begin together and step together."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from isthmus.errors import IsthmusError, OutOfOrderError, ProtocolError, RoundLostError
from isthmus.model.optimizer_settings import OptimizerSettings
from isthmus.recipe import Recipe, RoundSteps
from isthmus.recipe.tree import listed
from isthmus.storage.journal import Journal
from isthmus.trunk.round_vote import Asked, Beginning, RoundVote, Running
from isthmus.trunk.scheduler import Scheduler
from isthmus.trunk.training import TrunkTraining
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.barrier import Barrier
from isthmus.wire.channel import Answer
from isthmus.wire.patience import Heard, Patience

log = logging.getLogger(__name__)


@dataclass
class Arrival:
    """One silo's commit, which waits for those of the others."""

    request: pb.Commit
    answer: Answer


@dataclass
class OpenRound:
    """A running round without a fixed number of steps."""

    participants: frozenset[str]
    start: int | None = None
    """The saved round that it started from; None until the trunk is there."""
    ended: set[str] = field(default_factory=set)
    """The silos that wait for the others to end it."""


class SyncSteps:
    """Answers ``Begin`` and ``Commit``: a vote starts a round, a barrier stands at every optimizer step.

    The silos wait at most ``patience`` seconds for a late one, which contributes its gradients to the next step. Steps
    that a silo takes alone, between averages of replicas, have no barrier. A silo that has finished its steps is no
    longer waited for. Once the first silo has finished, the state is saved as the end of the round, from which trunk
    and root can continue whatever happens to the others.

    A silo that asks for a round takes none away from others (see ``round_vote.RoundVote``), unless these have not
    stepped for as long as it waits. One that asks again, for another, has given up what it asked for before.

    An open round has no fixed number of steps. A silo trains in it with a training loop of its own, until it sends
    ``End``; a second barrier waits for the ends of all. The trunk steps with the settings of the silos' own optimizers.
    An open round whose silos have all been replaced by new processes is undone. What changes for the silos is logged.

    Args:
        recipe: gives the silos' steps in a round, their learning rate, and the patience.
        journal: gets one line for each optimizer step taken together.
        heard: the silos that the trunk hears; None: all of them.
    """

    def __init__(
        self,
        training: TrunkTraining,
        scheduler: Scheduler,
        recipe: Recipe,
        journal: Journal,
        heard: Heard | None = None,
    ) -> None:
        self._training = training
        self._scheduler = scheduler
        self._recipe = recipe
        self._plans: dict[tuple[int, str], RoundSteps] = {}
        """By round and silo, the silo's steps."""
        self._journal = journal
        self._lock = threading.Lock()
        self._round = 0
        self._open: OpenRound | None = None
        """The running round, if it is open."""
        self._vote = RoundVote()
        self._clock: Patience | None = None
        """Ends the vote."""
        self._timed: float | None = None
        """The start of the vote that it ends."""
        self._participants: frozenset[str] = frozenset()
        """All silos that were named for the running round."""
        self._heard: dict[str, float] = {}
        """By silo, the time of its last step or begin."""
        self._done: dict[str, int] = {}
        """Number of optimizer steps that each silo has finished in this round."""
        self._missed: set[str] = set()
        """Silos of this round that a step went on without."""
        self._patience = recipe.waits.step
        self._present = heard
        self._commits: Barrier[Arrival] = Barrier(self._patience, self._step, heard)
        self._ends: Barrier[Answer] = Barrier(self._patience, self._end, heard)

    def begin(self, peer: str, request: pb.Begin) -> Answer:
        """Start a round; answered once all participants have come and the trunk is at the end of the previous round, or
        of the round from which an open one starts.

        Raises:
            ProtocolError: the silo is not among the participants, another round is running or starting, or the trunk
                has no state to begin from.
            RoundLostError: more silos, or as many, begin another.
        """
        answer: Answer = Answer()
        participants = list(request.participants) or [peer]
        if peer not in participants:
            raise ProtocolError(
                f"{peer} does not take part in round {request.round}", remedy="ask the root for the next plan"
            )
        steps = None if request.open else self._steps_of(peer, request)
        if not request.open:
            self._training.require_saved(request.round - 1)
        with self._lock:
            if steps is not None:
                self._plans[request.round, peer] = steps
            named = Beginning(request.round, participants=frozenset(participants))
            beginning = self._open_beginning(peer, request, participants) if request.open else named
            joins = self._joins(peer, beginning)
            if joins:
                self._done[peer] = 0
                self._heard[peer] = time.monotonic()
                self._training.begin(peer, beginning.number)
                self._training.expected = self._at_work()
                begun = self._begun()
                earlier = self._vote.withdraw(peer)
            else:
                earlier = self._vote.ask(peer, Asked(beginning, answer))
        if earlier is not None:
            earlier.answer.set_exception(round_lost(peer, earlier.beginning.number))
        if joins:
            log.info("trunk: %s joins round %d", peer, beginning.number)
            self._ends.expect(self._done)
            answer.set_result(begun)
        self._count_votes()
        return answer

    def _count_votes(self, since: float | None = None) -> None:
        """Begin the round that is asked for, if no silo is waited for any more.

        Args:
            since: begin it without those that are waited for, if the vote has gone on since then.
        """
        with self._lock:
            running = self._running()
            due = bool(self._vote) and (self._vote.since == since or not self._vote.awaited(running))
            outcome = self._vote.decide(running) if due else None
            self._time_vote()
            if outcome is not None and outcome.begins:
                self._enter(outcome.beginning, outcome.waiting.keys())
        if outcome is None:
            return
        for peer, asked in outcome.outvoted.items():
            asked.answer.set_exception(round_lost(peer, asked.beginning.number))
        number, names = outcome.beginning.number, listed(outcome.waiting)
        if outcome.begins:
            log.info("trunk: round %d begins with %s", number, names)
            self._start(outcome.beginning, outcome.waiting)
        else:
            log.warning("trunk: %s would begin round %d, others are at work", names, number)

    def _time_vote(self) -> None:
        """Have the vote end after the patience from its start: one clock for each start, however many ask."""
        since = self._vote.since if self._vote else None
        if since == self._timed:
            return
        if self._clock is not None:
            self._clock.cancel()
        self._timed, self._clock = since, None
        if since is not None:
            self._clock = Patience(
                self._patience, lambda: self._count_votes(since), lambda: self._vote.voters, self._present
            )

    def _open_beginning(self, peer: str, request: pb.Begin, participants: list[str]) -> Beginning:
        others, silos = self._vote.others(peer), frozenset(participants)
        start = request.start if request.HasField("start") else None
        beginning = Beginning(self._training.last_saved() + 1, True, silos, start, request.digest)
        if (self._round and self._open is None) or any(not other.open for other in others):
            raise ProtocolError(
                "a round of the federation is running",
                remedy="train with a loop of your own once the federation has finished, or start the trunk again",
            )
        if any(other != beginning for other in others):
            raise ProtocolError(
                "silos that train together differ in the round to start from, or in the silos that they name",
                remedy="name the same silos in join(..., participants=...), and load the same checkpoint everywhere",
            )
        return beginning

    def _joins(self, peer: str, beginning: Beginning) -> bool:
        """Whether a silo that begins is late for a running round, and joins it."""
        running = self._open
        if not beginning.open:
            same = beginning.number == self._round and beginning.participants <= self._participants
            return running is None and same and peer not in self._done
        if running is None:
            return False
        own = running.participants == beginning.participants and peer not in self._done
        if own and beginning.start in (None, running.start):
            return True
        if beginning.start is None:
            raise ProtocolError(
                f"{', '.join(sorted(self._done))} is training with the trunk",
                remedy="wait until it has saved its model, or train together: join(..., participants=...)",
            )
        return False  # what was trained since the last saved round is given up

    def _begun(self) -> pb.Begun:
        """The answer to a silo that joins the running round."""
        if self._open is None or self._open.start is None:
            return pb.Begun()
        start = self._open.start
        return pb.Begun(round=self._round, start=start, digest=self._training.digest(start))

    def end(self, peer: str, request: pb.End) -> Answer:
        """End an open round for this silo; answered once all its silos have ended it and the trunk has saved it.

        Raises:
            RoundLostError: the silo is not in this round, or the round is not open.
        """
        with self._lock:
            if self._open is None or request.round != self._round or peer not in self._done:
                raise round_lost(peer, request.round)
            self._open.ended.add(peer)
            self._training.expected = self._at_work()
        answer: Answer = Answer()
        self._commits.dismiss(peer)
        self._ends.arrive(peer, answer)
        return answer

    def settled(self, completed: int) -> None:
        """The root has finished this round: a silo that is still at work in it has lost it."""
        with self._lock:
            over = self._open is None and 0 < self._round <= completed
            self._round = 0 if over else self._round
        if over:
            self._commits.expect(())
            self._count_votes()

    def forget(self, peer: str) -> None:
        """Note that another process of a silo has connected. An open round of its earlier process alone is undone."""
        with self._lock:
            self._vote.withdraw(peer)
            left = self._open if self._open is not None and self._done.pop(peer, None) is not None else None
            alone = left is not None and not self._done
            if left is not None:
                left.ended.discard(peer)
                self._training.expected = self._at_work()
            if alone:
                self._round, self._open = 0, None
        if left is not None:
            self._commits.dismiss(peer)
            self._ends.dismiss(peer)
        if left is not None and alone and left.start is not None:
            start = left.start
            log.warning("trunk: another process of %s has connected; its round is undone", peer)
            self._scheduler.submit_urgent(lambda: self._training.restore(start))
        self._count_votes()

    def commit(self, peer: str, request: pb.Commit) -> Answer:
        """Contribute this silo's gradients to the next step; answered once that step is done.

        Raises:
            RoundLostError: the silo has not begun this round here.
            OutOfOrderError: the step is not the silo's next one.
            ProtocolError: an open round's commit lacks the optimizer, or another has one; or it claims more tokens than
                are in the silo's gradients.
        """
        with self._lock:
            if request.round != self._round or peer not in self._done:
                raise round_lost(peer, request.round)
            if request.HasField("optimizer") == (self._open is None):
                raise ProtocolError(
                    "open rounds step with the silo's optimizer, those of a federation with the recipe's",
                    remedy="both sides must run the same version of isthmus",
                )
            check_next(request, self._done[peer], self._most(peer))
            most = math.inf if self._open is not None else self._recipe.train.step_tokens
            check_weight(peer, request.weight, min(self._training.counted(peer), most))
            self._heard[peer] = time.monotonic()
            together = self._open is not None or self._training.steps_together(request.step)
        answer: Answer = Answer()
        if together:
            self._commits.arrive(peer, Arrival(request, answer))
        else:
            self._step_alone(peer, Arrival(request, answer))
        return answer

    def _enter(self, beginning: Beginning, silos: Iterable[str]) -> None:
        """Leave the running round, with the lock held, for another."""
        self._participants = beginning.participants
        self._heard |= dict.fromkeys(silos, time.monotonic())
        self._round = beginning.number
        self._open = OpenRound(beginning.participants) if beginning.open else None
        self._done, self._missed = dict.fromkeys(silos, 0), set()
        self._plans = {key: steps for key, steps in self._plans.items() if key[0] >= beginning.number}
        self._training.expected = len(self._done)

    def _start(self, beginning: Beginning, waiting: dict[str, Answer]) -> None:
        self._commits.expect(waiting)
        self._ends.expect(waiting)

        def restore() -> pb.Begun:
            self._training.restore(beginning.number - 1)
            for peer in waiting:
                self._training.begin(peer, beginning.number)
            return pb.Begun()

        def start() -> pb.Begun:
            begun = self._start_open(beginning)
            for peer in waiting:
                self._training.begin(peer, begun.round)
            return begun

        _answer_all(list(waiting.values()), self._scheduler, start if beginning.open else restore)

    def _start_open(self, beginning: Beginning) -> pb.Begun:
        try:
            if beginning.start is None:
                start, digest = self._training.start_here()
            else:
                start, digest = self._training.start_from(beginning.start, beginning.digest)
        except IsthmusError:
            with self._lock:
                self._round, self._open = 0, None
            raise
        with self._lock:
            self._open = OpenRound(beginning.participants, start)
        return pb.Begun(round=beginning.number, start=start, digest=digest)

    def _end(self, waiting: dict[str, Answer]) -> None:
        with self._lock:
            number, self._round, self._open = self._round, 0, None
        log.info("trunk: %s ended round %d", listed(waiting), number)
        _answer_all(list(waiting.values()), self._scheduler, lambda: pb.Ended(digest=self._training.save(number)))
        self._count_votes()

    def _step(self, arrivals: dict[str, Arrival]) -> None:
        with self._lock:
            number = self._round
            late = {peer: arrival for peer, arrival in arrivals.items() if arrival.request.round != number}
            arrivals = {peer: arrival for peer, arrival in arrivals.items() if peer not in late}
            missed = self._workers() - arrivals.keys() - self._missed
            self._missed = (self._missed | missed) - arrivals.keys()
            self._done |= {peer: arrival.request.step for peer, arrival in arrivals.items()}
            self._heard |= dict.fromkeys(arrivals, time.monotonic())
            finished = {peer for peer, step in self._done.items() if step >= self._most(peer)}
            open = self._open is not None
            self._training.expected = self._at_work()
            own = {} if self._open is not None else arrivals
            contributing = [(self._plans[number, peer], arrival.request.step) for peer, arrival in own.items()]
        for peer, arrival in late.items():  # the round ended before they reached the barrier
            arrival.answer.set_exception(round_lost(peer, arrival.request.round))
        if not arrivals:
            return
        if missed:
            log.warning("trunk: round %d goes on without %s", number, listed(missed))
        for peer in finished:
            self._commits.dismiss(peer)
        over = not open and not self._commits.expected
        if over:
            log.info("trunk: round %d is over", number)
            with self._lock:
                self._round = 0  # later commits belong to no round

        def step() -> pb.Stepped:
            if open:
                self._follow({peer: arrival.request for peer, arrival in arrivals.items()})
            else:
                weights = {peer: arrival.request.weight for peer, arrival in arrivals.items()}
                self._training.step(weights, rate=self._recipe.rate(contributing))
            if finished & arrivals.keys():
                self._training.save(number)
            self._journal.append(
                {"round": number, "step": max(arrival.request.step for arrival in arrivals.values())}
                | {"silos": sorted(arrivals)}
            )
            return pb.Stepped(contributors=len(arrivals))

        _answer_all([arrival.answer for arrival in arrivals.values()], self._scheduler, step)
        if over:
            self._count_votes()  # who waits for another round need not wait for this one any more

    def _follow(self, requests: dict[str, pb.Commit]) -> None:
        """Take a step of an open round with the settings that its silos agree on."""
        own = [OptimizerSettings.received(request.optimizer) for request in requests.values()]
        fresh = all(one.fresh for one in own)  # a late silo's is, the trunk's is not
        settings = {replace(one, fresh=fresh) for one in own}
        if len(settings) > 1:
            raise ProtocolError(
                f"the optimizers of {', '.join(sorted(requests))} differ in this step",
                remedy="use the same optimizer, learning rate and schedule at all silos of an open round",
            )
        contributions = {
            peer: (request.weight, request.scale if request.HasField("scale") else 1.0)
            for peer, request in requests.items()
        }
        self._training.follow(contributions, settings.pop())

    def _step_alone(self, peer: str, arrival: Arrival) -> None:
        with self._lock:
            self._done[peer] = arrival.request.step
            request = arrival.request
            rate = self._recipe.rate([(self._plans[request.round, peer], request.step)])

        def step() -> pb.Stepped:
            self._training.step({peer: request.weight}, together=False, rate=rate)
            return pb.Stepped(contributors=1)

        _answer_all([arrival.answer], self._scheduler, step)

    def _running(self) -> Running:
        saved = self._training.completed == self._round
        return Running(self._round, self._workers(), self._heard, saved) if self._round else Running()

    def _at_work(self) -> int:
        """Number of silos of the running round that have not finished their steps."""
        return len(self._workers())

    def _workers(self) -> frozenset[str]:
        """The silos of the running round that have not finished their steps."""
        if not self._round:
            return frozenset()
        ended = set() if self._open is None else self._open.ended
        return frozenset(peer for peer, step in self._done.items() if step < self._most(peer) and peer not in ended)

    def _most(self, peer: str) -> float:
        """Largest number of optimizer steps of a silo in the running round."""
        if self._open is not None:
            return math.inf
        steps = self._plans.get((self._round, peer))
        return 0 if steps is None else steps.count

    def _steps_of(self, peer: str, request: pb.Begin) -> RoundSteps:
        """A silo's steps in a round: its own with ``train.epochs``, else the recipe's.

        Raises:
            ProtocolError: it brings its own against the recipe, or none, or impossible ones.
        """
        own = request.steps
        if request.HasField("steps") != (self._recipe.train.epochs is not None):
            raise ProtocolError(
                f"{peer} and the trunk differ in train.epochs", remedy="use the same recipe on both sides"
            )
        if not request.HasField("steps"):
            return self._recipe.round_steps(peer, request.round)
        steps = self._recipe.part_of_run(own.total, request.round)
        wrong = (own.count, own.before) != (steps.count, steps.before) or own.total % (self._recipe.train.epochs or 1)
        if wrong or not 1 <= own.count <= own.total - own.before:
            raise ProtocolError(
                f"{peer} has {own.count} steps after {own.before} of {own.total} in round {request.round}; that is no "
                f"even part of {self._recipe.train.epochs} passes over its rows in {self._recipe.train.rounds} rounds",
                remedy="update isthmus on both sides",
            )
        return steps


def check_next(request: pb.Commit, done: int, most: float) -> None:
    """Check that a commit is the silo's next step.

    Args:
        done: steps that the silo has committed in this round.
        most: steps of a round.

    Raises:
        OutOfOrderError: the commit is of another step.
    """
    if request.step != done + 1:
        raise OutOfOrderError(
            f"received optimizer step {request.step}, expected step {done + 1}",
            remedy="commit each step once, in order",
        )
    if request.step > most:
        raise OutOfOrderError(
            f"received optimizer step {request.step}; a round has {most}",
            remedy="use the same train.steps on both sides",
        )


def check_weight(peer: str, weight: float, most: float) -> None:
    """Check that a commit weighs no more than the trunk counted: a silo's weight is its share of everybody's step.

    Args:
        most: tokens in the silo's gradients.

    Raises:
        ProtocolError: it weighs more.
    """
    if weight > most:
        raise ProtocolError(
            f"{peer} claims {weight:g} tokens in this step, its gradients may weigh {most:g}",
            remedy="claim the supervised tokens of the backwards since the last step; update isthmus on both sides",
        )


def round_lost(peer: str, round: int) -> RoundLostError:
    """The error for a request of a round that this silo has not begun, or that is over."""
    return RoundLostError(f"{peer} is not in round {round}", remedy="ask the root for the next plan")


def _answer_all(answers: list[Answer], scheduler: Scheduler, job) -> None:  # type: ignore[no-untyped-def]
    """Run the job and settle all these answers with its result or its error."""

    def settle(done: Answer) -> None:
        error = done.exception()
        for answer in answers:
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(done.result())

    scheduler.submit_urgent(job).add_done_callback(settle)
