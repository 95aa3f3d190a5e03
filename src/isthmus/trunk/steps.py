"""Rounds and optimizer steps as the trunk sees them: silos begin together and step together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from isthmus.errors import OutOfOrderError, ProtocolError, RoundLostError
from isthmus.storage.record import Journal
from isthmus.trunk.scheduler import Scheduler
from isthmus.trunk.training import Training
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.barrier import Barrier
from isthmus.wire.channel import Answer


@dataclass
class Arrival:
    """One silo's commit, waiting for the others."""

    request: pb.Commit
    answer: Answer


class Steps:
    """Two barriers: one before a round's first step, one at every optimizer step.

    A silo that is late for a step joins the next one with its gradients; the others do not wait longer than
    ``patience`` seconds for it. Steps that a silo takes by itself, between averages of replicas, have no barrier.
    A silo whose steps are done is not waited for any more. From the first that is, the round has an end that trunk and
    root can go on from, whatever becomes of the others.

    Args:
        steps: of a silo's name, how many it takes in a round.
    """

    def __init__(
        self, training: Training, scheduler: Scheduler, steps: Callable[[str], int], patience: float, journal: Journal
    ) -> None:
        self._training = training
        self._scheduler = scheduler
        self._steps = steps
        self._journal = journal
        self._lock = threading.Lock()
        self._round = 0
        self._gathering = 0
        self._done: dict[str, int] = {}
        """Optimizer steps each silo has finished in this round."""
        self._starts: Barrier[Answer] = Barrier(patience, self._start)
        self._commits: Barrier[Arrival] = Barrier(patience, self._step)

    def begin(self, peer: str, request: pb.Begin) -> Answer:
        """Answered once all participants are there and the trunk is at the end of the round before."""
        answer: Answer = Answer()
        if peer not in request.participants:
            raise ProtocolError(f"{peer} is no participant of round {request.round}", remedy="wait for the next plan")
        with self._lock:
            running = request.round == self._round and peer not in self._done
            if running:
                self._done[peer] = 0
                self._training.expected = self._at_work()
            elif request.round != self._gathering:
                self._gathering = request.round
                self._starts.expect(request.participants)
        if running:  # late for the start: it joins the round under way
            answer.set_result(pb.Begun())
        else:
            self._starts.arrive(peer, answer)
        return answer

    def commit(self, peer: str, request: pb.Commit) -> Answer:
        """Answered once the step that this silo's gradients are part of is done.

        Raises:
            RoundLostError: the silo has not begun this round here.
            OutOfOrderError: not its next step.
        """
        with self._lock:
            if request.round != self._round or peer not in self._done:
                raise lost(peer, request.round)
            check_next(request, self._done[peer], self._steps(peer))
        answer: Answer = Answer()
        if self._training.waits(request.step):
            self._commits.arrive(peer, Arrival(request, answer))
        else:
            self._step_alone(peer, Arrival(request, answer))
        return answer

    def _start(self, waiting: dict[str, Answer]) -> None:
        with self._lock:
            number, self._gathering = self._gathering, 0
            self._round = number
            self._done = dict.fromkeys(waiting, 0)
            self._training.expected = len(waiting)
        self._commits.expect(waiting)

        def restore() -> pb.Begun:
            self._training.restore(number - 1)
            return pb.Begun()

        _answer_all(list(waiting.values()), self._scheduler, restore)

    def _step(self, arrivals: dict[str, Arrival]) -> None:
        with self._lock:
            number = self._round
            late = {peer: arrival for peer, arrival in arrivals.items() if arrival.request.round != number}
            arrivals = {peer: arrival for peer, arrival in arrivals.items() if peer not in late}
            self._done |= {peer: arrival.request.step for peer, arrival in arrivals.items()}
            finished = {peer for peer, step in self._done.items() if step >= self._steps(peer)}
            self._training.expected = self._at_work()
        for peer, arrival in late.items():  # the round ended while they were on their way to the barrier
            arrival.answer.set_exception(lost(peer, arrival.request.round))
        if not arrivals:
            return
        for peer in finished:
            self._commits.dismiss(peer)
        over = not self._commits.expected
        if over:
            with self._lock:
                self._round = 0  # what comes now is late for good

        def step() -> pb.Stepped:
            self._training.step({peer: arrival.request.weight for peer, arrival in arrivals.items()})
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

        def step() -> pb.Stepped:
            self._training.step({peer: arrival.request.weight}, together=False)
            return pb.Stepped(contributors=1)

        _answer_all([arrival.answer], self._scheduler, step)

    def _at_work(self) -> int:
        """Silos of the round under way that have steps before them."""
        return sum(step < self._steps(peer) for peer, step in self._done.items())


def check_next(request: pb.Commit, done: int, most: int) -> None:
    """Raise ``OutOfOrderError`` unless this commit is of the step after those that are done, of so many."""
    if request.step != done + 1:
        raise OutOfOrderError(f"optimizer step {request.step}, step {done + 1} is next", remedy="commit in order")
    if request.step > most:
        raise OutOfOrderError(f"optimizer step {request.step} of {most}", remedy="commit train.steps times a round")


def lost(peer: str, round: int) -> RoundLostError:
    return RoundLostError(f"{peer} is not in round {round}", remedy="ask for the next plan")


def _answer_all(answers: list[Answer], scheduler: Scheduler, job) -> None:  # type: ignore[no-untyped-def]
    """Run the job and give its result, or its error, to everyone waiting."""

    def settle(done: Answer) -> None:
        error = done.exception()
        for answer in answers:
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(done.result())

    scheduler.submit(job).add_done_callback(settle)
