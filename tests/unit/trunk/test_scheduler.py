"""The scheduler with kinds of job that only note what they were asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import pytest

from isthmus.errors import ProtocolError, RankLostError
from isthmus.trunk.scheduler import QUEUED_BYTES, SINGLE, ComputeOver, Job, Scheduler, fair_shares

WAIT = 20.0
TICK = 0.05
Order = list[Any]


class Noting:
    """Runs up to ``most`` jobs at a time, once ``least`` are there or the oldest has waited ``patience`` seconds."""

    rests = False

    def __init__(self, *, least: int = 1, most: int = 100, patience: float = 0.0) -> None:
        self.least, self.most, self.patience = least, most, patience
        self.gathered = 0
        self.passes: list[list[Any]] = []

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        self.gathered += 1
        left = min(job.since for job in jobs) + self.patience - now
        if len(jobs) >= self.least or left <= 0:
            return jobs[: self.most], 0.0
        return [], left

    def run(self, jobs: list[Job]) -> None:
        self.passes.append([job.request for job in jobs])
        for job in jobs:
            job.done.set_result(job.request)


class Held:
    """Holds the compute thread, so that what comes meanwhile is all there when it goes on."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._go = threading.Event()
        began = threading.Event()
        self.done = scheduler.submit(lambda: (began.set(), self._go.wait(WAIT)))
        assert began.wait(WAIT)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self._go.set()


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    started = Scheduler()
    yield started
    started.stop()


def results(*answers: Future[Any]) -> list[Any]:
    return [answer.result(WAIT) for answer in answers]


def test_one_lane_keeps_its_order_and_has_one_job_under_way(scheduler: Scheduler) -> None:
    kind = Noting()
    with Held(scheduler):
        answers = [scheduler.enqueue(kind, ("a", "x"), number) for number in range(5)]
    assert results(*answers) == [0, 1, 2, 3, 4]
    assert kind.passes == [[0], [1], [2], [3], [4]]


def test_one_lane_keeps_its_order_across_kinds(scheduler: Scheduler) -> None:
    order: Order = []
    slow, fast = Noting(least=2, patience=TICK), Noting()
    with Held(scheduler):
        first = scheduler.enqueue(slow, ("a",), 1)
        second = scheduler.enqueue(fast, ("a",), 2)
        for answer in (first, second):
            answer.add_done_callback(lambda done: order.append(done.result()))
    results(first, second)
    assert order == [1, 2]


def test_first_jobs_of_different_lanes_run_together(scheduler: Scheduler) -> None:
    kind = Noting()
    with Held(scheduler):
        answers = [scheduler.enqueue(kind, (lane,), f"{lane}{number}") for number in (1, 2) for lane in "abc"]
    results(*answers)
    assert kind.passes == [["a1", "b1", "c1"], ["a2", "b2", "c2"]]


def test_jobs_left_out_of_a_full_pass_come_in_the_next(scheduler: Scheduler) -> None:
    kind = Noting(most=2)
    with Held(scheduler):
        answers = [scheduler.enqueue(kind, (lane,), lane) for lane in "abcde"]
    results(*answers)
    assert kind.passes == [["a", "b"], ["c", "d"], ["e"]]


def test_a_job_of_no_lane_comes_before_whatever_came_after_it(scheduler: Scheduler) -> None:
    order: Order = []
    kind = Noting()
    with Held(scheduler):
        answers = [scheduler.enqueue(kind, ("a",), "before")]
        answers.append(scheduler.submit(lambda: "alone"))
        answers += [scheduler.enqueue(kind, ("b",), "after"), scheduler.enqueue(kind, ("a",), "after too")]
        for answer in answers:
            answer.add_done_callback(lambda done: order.append(done.result()))
    results(*answers)
    assert order == ["before", "alone", "after", "after too"]
    assert kind.passes == [["before"], ["after", "after too"]]


def test_a_job_of_no_lane_does_not_wait_for_those_that_wait_for_others(scheduler: Scheduler) -> None:
    patient = Noting(least=2, patience=WAIT)
    waiting = scheduler.enqueue(patient, ("a",), 1)
    assert scheduler.submit(lambda: "done").result(WAIT) == "done"
    assert not waiting.done()


def test_kinds_are_served_oldest_first(scheduler: Scheduler) -> None:
    order: Order = []
    kinds = [Noting(), Noting(), Noting()]
    with Held(scheduler):
        answers = [scheduler.enqueue(kinds[number], (number,), number) for number in (2, 0, 1)]
        for answer in answers:
            answer.add_done_callback(lambda done: order.append(done.result()))
    results(*answers)
    assert order == [2, 0, 1]


class Slow(Noting):
    """Takes several turns for every job."""

    def __init__(self, turns: int, note: Callable[[Any], None]) -> None:
        super().__init__()
        self._left = turns
        self._note = note

    def run(self, jobs: list[Job]) -> None:
        self._left -= 1
        self._note(f"turn {self._left}")
        if self._left == 0:
            super().run(jobs)


def test_whoever_waits_comes_between_the_turns_of_a_long_job(scheduler: Scheduler) -> None:
    order: Order = []
    slow, other = Slow(3, order.append), Noting()
    with Held(scheduler):
        answers = [scheduler.enqueue(slow, ("a",), "slow")]
        answers += [scheduler.enqueue(other, ("b",), number) for number in (1, 2)]
        for answer in answers:
            answer.add_done_callback(lambda done: order.append(done.result()))
    results(*answers)
    assert order == ["turn 2", 1, "turn 1", 2, "turn 0", "slow"]


class Failing(Noting):
    """Raises in ``gather`` while a job asks for it, and in ``run``."""

    def gather(self, jobs: list[Job], now: float) -> tuple[list[Job], float]:
        if jobs[0].request == "bad to gather":
            raise ValueError("gather")
        return super().gather(jobs, now)

    def run(self, jobs: list[Job]) -> None:
        if any(job.request == "settled first" for job in jobs):
            super().run([job for job in jobs if job.request == "settled first"])
        if any(job.request == "bad to run" for job in jobs):
            raise ValueError("run")
        super().run([job for job in jobs if not job.done.done()])


def test_an_error_in_gather_is_the_first_jobs_alone(scheduler: Scheduler) -> None:
    kind = Failing()
    with Held(scheduler):
        bad = scheduler.enqueue(kind, ("a",), "bad to gather")
        good = [scheduler.enqueue(kind, (lane,), lane) for lane in "bc"]
    with pytest.raises(ValueError, match="gather"):
        bad.result(WAIT)
    assert results(*good) == ["b", "c"]


def test_an_error_in_run_reaches_those_that_ran_and_were_not_settled(scheduler: Scheduler) -> None:
    kind, other = Failing(), Noting()
    with Held(scheduler):
        settled = scheduler.enqueue(kind, ("a",), "settled first")
        failed = [scheduler.enqueue(kind, (lane,), request) for lane, request in (("b", "bad to run"), ("c", "fine"))]
        later, elsewhere = scheduler.enqueue(kind, ("c",), "later"), scheduler.enqueue(other, ("d",), "elsewhere")
    assert results(settled, later, elsewhere) == ["settled first", "later", "elsewhere"]
    for answer in failed:
        with pytest.raises(ValueError, match="run"):
            answer.result(WAIT)


def test_the_thread_outlives_errors_of_jobs_of_no_lane(scheduler: Scheduler) -> None:
    def fail() -> None:
        raise KeyError("x")

    for _ in range(3):
        with pytest.raises(KeyError):
            scheduler.submit(fail).result(WAIT)
    assert scheduler.submit(lambda: 4).result(WAIT) == 4


def test_drop_fails_only_what_that_silo_sent_before(scheduler: Scheduler) -> None:
    kind = Noting(least=5, patience=WAIT)
    before = [scheduler.enqueue(kind, lane, lane) for lane in (("a", 1), ("a", 2), ("b", 1))]
    with Held(scheduler):
        dropped = scheduler.submit(lambda: scheduler.drop("a", KeyError("gone")))
        after = scheduler.enqueue(kind, ("a", 1), "after")
    dropped.result(WAIT)
    for answer in before[:2]:
        with pytest.raises(KeyError):
            answer.result(WAIT)
    kind.patience = 0.0
    scheduler.enqueue(kind, ("c",), "c").result(WAIT)  # it is asked again
    assert results(before[2], after) == [("b", 1), "after"]


def test_nothing_spins_while_a_kind_asks_to_wait(scheduler: Scheduler) -> None:
    first, second = Noting(least=2, patience=4 * TICK), Noting(least=2, patience=8 * TICK)
    began = time.monotonic()
    answers = [scheduler.enqueue(first, ("a",), 1), scheduler.enqueue(second, ("b",), 2)]
    assert results(*answers) == [1, 2]
    assert 8 * TICK <= time.monotonic() - began < WAIT / 2
    assert first.gathered <= 5
    assert second.gathered <= 7


def test_nothing_runs_while_nothing_is_to_be_done(scheduler: Scheduler) -> None:
    kind = Noting()
    scheduler.enqueue(kind, ("a",), 1).result(WAIT)
    gathered = kind.gathered
    time.sleep(TICK)
    assert kind.gathered == gathered


def test_a_waiting_kind_is_asked_again_when_another_job_comes(scheduler: Scheduler) -> None:
    kind = Noting(least=2, patience=WAIT)
    first = scheduler.enqueue(kind, ("a",), 1)
    time.sleep(TICK)
    assert not first.done()
    assert results(scheduler.enqueue(kind, ("b",), 2), first) == [2, 1]


def test_stop_ends_the_thread() -> None:
    before = set(threading.enumerate())
    scheduler = Scheduler()
    (worker,) = set(threading.enumerate()) - before
    wait([scheduler.submit(lambda: None)], WAIT)
    scheduler.stop()
    worker.join(WAIT)
    assert not worker.is_alive()


def test_silos_take_turns_however_many_lanes_they_have(scheduler: Scheduler) -> None:
    kind = Noting(most=1)
    with Held(scheduler):
        answers = [scheduler.enqueue(kind, ("a", lane), f"a{lane}") for lane in range(4)]
        answers += [scheduler.enqueue(kind, ("b", lane), f"b{lane}") for lane in range(2)]
    results(*answers)
    assert kind.passes == [["a0"], ["b0"], ["a1"], ["b1"], ["a2"], ["a3"]]


def test_an_urgent_job_comes_before_all_others(scheduler: Scheduler) -> None:
    order: Order = []
    kind = Noting()
    with Held(scheduler):
        answers = [scheduler.enqueue(kind, ("a",), "first"), scheduler.submit_urgent(lambda: "urgent")]
        for answer in answers:
            answer.add_done_callback(lambda done: order.append(done.result()))
    results(*answers)
    assert order == ["urgent", "first"]


def test_what_a_silo_may_have_waiting_is_bounded(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.trunk.scheduler.QUEUED_JOBS", 2)
    kind = Noting()
    with Held(scheduler):
        answers = [scheduler.enqueue(kind, ("a", lane), lane, QUEUED_BYTES // 2) for lane in range(2)]
        with pytest.raises(ProtocolError, match="2 requests of a"):
            scheduler.enqueue(kind, ("a", 2), 2)
        answers.append(scheduler.enqueue(kind, ("b", 0), 0, 2 * QUEUED_BYTES))  # one alone has room
        with pytest.raises(ProtocolError, match="wait for answers") as refused:
            scheduler.enqueue(kind, ("b", 1), 1, 1)
        assert refused.value.remedy
        assert scheduler.waiting == {"a": 2, "b": 1}
        assert scheduler.waiting_bytes == {"a": QUEUED_BYTES, "b": 2 * QUEUED_BYTES}
    results(*answers)
    assert not scheduler.waiting
    scheduler.enqueue(kind, ("a", 2), 2).result(WAIT)


def test_tidy_is_called_again_when_it_asks_for_it(scheduler: Scheduler) -> None:
    calls: Order = []
    scheduler.tidy = lambda: TICK if not calls.append(0) and len(calls) < 3 else None  # type: ignore[func-returns-value]
    scheduler.submit(lambda: None).result(WAIT)
    deadline = time.monotonic() + WAIT
    while len(calls) < 3 and time.monotonic() < deadline:
        time.sleep(TICK)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("wanted", "room", "shares"),
    [
        ({"a": 3, "b": 100}, 32, {"a": 3, "b": 29}),
        ({"a": 50, "b": 100}, 32, {"a": 16, "b": 16}),
        ({"a": 1, "b": 10, "c": 40}, 30, {"a": 1, "b": 10, "c": 19}),
        ({"a": 5}, 3, {"a": 3}),
        ({}, 3, {}),
    ],
)
def test_fair_shares(wanted: dict[str, int], room: int, shares: dict[str, int]) -> None:
    assert fair_shares(wanted, room) == shares


def test_after_a_long_pass_alone_a_silo_rests_while_others_are_active(scheduler: Scheduler) -> None:
    order: Order = []

    class Long(Noting):
        rests = True

        def run(self, jobs: list[Job]) -> None:
            time.sleep(4 * TICK)
            order.append("long")
            super().run(jobs)

    long, short = Long(), Noting()
    with Held(scheduler):
        answers = [scheduler.enqueue(long, ("a",), number) for number in range(2)]
        other = scheduler.enqueue(short, ("b",), "short")
    other.result(WAIT)
    other = scheduler.enqueue(short, ("b",), "another")  # after the other silo has thought
    other.result(WAIT)
    assert order == ["long"]
    assert results(*answers) == [0, 1]


def test_who_rests_waits_for_those_alone_that_rest_less(scheduler: Scheduler) -> None:
    class Long(Noting):
        rests = True

    now = time.monotonic()
    scheduler._active = dict.fromkeys("abc", now) | {"late": now - 1}
    scheduler._rests = {"a": now + 1, "b": now + 2}
    job, short = Job(Long(), ("a", "train"), None), Job(Noting(), ("a", "decode"), None)
    assert scheduler._resting(job, now), "c may want the trunk"
    assert not scheduler._resting(short, now)
    assert not scheduler._resting(job, now + 1)
    del scheduler._active["c"]
    assert not scheduler._resting(job, now), "b rests longer, and the other has been silent"
    assert scheduler._resting(Job(Long(), ("b", "train"), None), now)
    scheduler._waiting = [Job(Noting(), ("late", "decode"), None, since=now - 1)]
    assert scheduler._resting(job, now), "whose request waits is active"
    scheduler._waiting = []


def test_when_nothing_can_be_computed_requests_stay_without_an_answer() -> None:
    """The trunk's own work gets the error; what silos asked for waits for the process that comes next."""
    error = RankLostError("rank 1 is gone", remedy="start all again")

    def fail() -> None:
        raise ComputeOver(error)

    scheduler = Scheduler()
    asked, later = (scheduler.enqueue(SINGLE, ("a", "train"), work) for work in (fail, lambda: 1))
    scheduler.join()
    assert not scheduler.alive
    assert not asked.done()
    assert not later.done()
    scheduler = Scheduler()
    with pytest.raises(RankLostError, match="rank 1 is gone"):
        scheduler.submit(fail).result(WAIT)
    scheduler.join()
