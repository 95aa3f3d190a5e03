"""Synchronous rounds and optimizer steps on the trunk: silos begin together and step together."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from isthmus.errors import OutOfOrderError, ProtocolError, RoundLostError
from isthmus.recipe import Recipe, RoundSteps
from isthmus.storage.record import Journal
from isthmus.trunk.scheduler import Scheduler
from isthmus.trunk.training import TrunkTraining
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.barrier import Barrier
from isthmus.wire.channel import Answer


@dataclass
class Arrival:
    """One silo's commit, which waits for those of the others."""

    request: pb.Commit
    answer: Answer


class SyncSteps:
    """Answers ``Begin`` and ``Commit`` with two barriers: one at the start of a round, one at every optimizer step.

    The silos wait at most ``patience`` seconds for a late one, which contributes its gradients to the next step. Steps
    that a silo takes alone, between averages of replicas, have no barrier. A silo that has finished its steps is no
    longer waited for. Once the first silo has finished, the state is saved as the end of the round, from which trunk
    and root can continue whatever happens to the others.

    Args:
        recipe: gives the silos' steps in a round, their learning rate, and the patience.
        journal: gets one line for each optimizer step taken together.
    """

    def __init__(self, training: TrunkTraining, scheduler: Scheduler, recipe: Recipe, journal: Journal) -> None:
        self._training = training
        self._scheduler = scheduler
        self._recipe = recipe
        self._plans: dict[tuple[int, str], RoundSteps] = {}
        """By round and silo, the silo's steps."""
        self._journal = journal
        self._lock = threading.Lock()
        self._round = 0
        self._gathering = 0
        self._done: dict[str, int] = {}
        """Number of optimizer steps that each silo has finished in this round."""
        self._starts: Barrier[Answer] = Barrier(recipe.trunk.patience, self._start)
        self._commits: Barrier[Arrival] = Barrier(recipe.trunk.patience, self._step)

    def begin(self, peer: str, request: pb.Begin) -> Answer:
        """Start a round; answered once all participants have come and the trunk is at the end of the previous round.

        Raises:
            ProtocolError: the silo is not among the participants.
        """
        answer: Answer = Answer()
        if peer not in request.participants:
            raise ProtocolError(
                f"{peer} does not take part in round {request.round}", remedy="ask the root for the next plan"
            )
        steps = self._steps_of(peer, request)
        with self._lock:
            self._plans[request.round, peer] = steps
            running = request.round == self._round and peer not in self._done
            if running:
                self._done[peer] = 0
                self._training.begin(peer, request.round)
                self._training.expected = self._at_work()
            elif request.round != self._gathering:
                self._gathering = request.round
                self._starts.expect(request.participants)
        if running:  # late for the start: join the running round
            answer.set_result(pb.Begun())
        else:
            self._starts.arrive(peer, answer)
        return answer

    def commit(self, peer: str, request: pb.Commit) -> Answer:
        """Contribute this silo's gradients to the next step; answered once that step is done.

        Raises:
            RoundLostError: the silo has not begun this round here.
            OutOfOrderError: the step is not the silo's next one.
        """
        with self._lock:
            if request.round != self._round or peer not in self._done:
                raise round_lost(peer, request.round)
            check_next(request, self._done[peer], self._most(peer))
        answer: Answer = Answer()
        if self._training.steps_together(request.step):
            self._commits.arrive(peer, Arrival(request, answer))
        else:
            self._step_alone(peer, Arrival(request, answer))
        return answer

    def _start(self, waiting: dict[str, Answer]) -> None:
        with self._lock:
            number, self._gathering = self._gathering, 0
            self._round = number
            self._done = dict.fromkeys(waiting, 0)
            self._plans = {key: steps for key, steps in self._plans.items() if key[0] >= number}
            self._training.expected = len(waiting)
        self._commits.expect(waiting)

        def restore() -> pb.Begun:
            self._training.restore(number - 1)
            for peer in waiting:
                self._training.begin(peer, number)
            return pb.Begun()

        _answer_all(list(waiting.values()), self._scheduler, restore)

    def _step(self, arrivals: dict[str, Arrival]) -> None:
        with self._lock:
            number = self._round
            late = {peer: arrival for peer, arrival in arrivals.items() if arrival.request.round != number}
            arrivals = {peer: arrival for peer, arrival in arrivals.items() if peer not in late}
            self._done |= {peer: arrival.request.step for peer, arrival in arrivals.items()}
            finished = {peer for peer, step in self._done.items() if step >= self._most(peer)}
            self._training.expected = self._at_work()
            contributing = [(self._plans[number, peer], arrival.request.step) for peer, arrival in arrivals.items()]
        for peer, arrival in late.items():  # the round ended before they reached the barrier
            arrival.answer.set_exception(round_lost(peer, arrival.request.round))
        if not arrivals:
            return
        for peer in finished:
            self._commits.dismiss(peer)
        over = not self._commits.expected
        if over:
            with self._lock:
                self._round = 0  # later commits belong to no round

        def step() -> pb.Stepped:
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

    def _step_alone(self, peer: str, arrival: Arrival) -> None:
        with self._lock:
            self._done[peer] = arrival.request.step
            request = arrival.request
            rate = self._recipe.rate([(self._plans[request.round, peer], request.step)])

        def step() -> pb.Stepped:
            self._training.step({peer: request.weight}, together=False, rate=rate)
            return pb.Stepped(contributors=1)

        _answer_all([arrival.answer], self._scheduler, step)

    def _at_work(self) -> int:
        """Number of silos of the running round that have not finished their steps."""
        return sum(step < self._most(peer) for peer, step in self._done.items())

    def _most(self, peer: str) -> int:
        """Optimizer steps of a silo of the running round."""
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
        if not 1 <= own.count <= own.total - own.before:
            raise ProtocolError(
                f"{peer} has {own.count} steps after {own.before} of {own.total}", remedy="update isthmus on both sides"
            )
        return RoundSteps(own.count, own.before, own.total)


def check_next(request: pb.Commit, done: int, most: int) -> None:
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

    scheduler.submit(job).add_done_callback(settle)
