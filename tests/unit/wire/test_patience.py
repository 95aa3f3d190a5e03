"""Patience ends after its time, unless none of those who wait is heard: then it begins again once one is."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Collection

import pytest

from isthmus.wire.barrier import Barrier
from isthmus.wire.patience import Heard, Patience

SOON, HANG = 0.05, 60.0


class Silence(Heard):
    """Says that everyone is silent until it is told otherwise."""

    def __init__(self) -> None:
        super().__init__(HANG)
        self.now, self.asked, self.seen = True, 0, list[Collection[str]]()

    def silent(self, peers: Collection[str]) -> bool:
        self.asked += 1
        self.seen.append(tuple(peers))
        return self.now and bool(peers)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_it_rings_once() -> None:
    rings: list[int] = []
    rung = threading.Event()
    Patience(SOON, lambda: (rings.append(1), rung.set())[-1], tuple, None)  # type: ignore[func-returns-value]
    assert rung.wait(HANG)
    assert rings == [1]


def test_cancelled_it_does_not_ring() -> None:
    rung = threading.Event()
    patience = Patience(SOON, rung.set, tuple, None)
    patience.cancel()
    patience._look()  # a timer that had begun to ring
    assert not rung.is_set()


def test_while_nobody_is_heard_it_waits_and_then_as_long_again(monkeypatch: pytest.MonkeyPatch) -> None:
    heard, rung, armed = Silence(), threading.Event(), list[float]()
    arm = Patience._arm

    def noted(self: Patience, seconds: float) -> None:
        armed.append(seconds)
        arm(self, 0.0)

    monkeypatch.setattr(Patience, "_arm", noted)
    Patience(30.0, rung.set, lambda: {"a"}, heard)
    until(lambda: heard.asked > 3)
    assert not rung.is_set()
    heard.now = False
    assert rung.wait(HANG)
    assert armed[0] == armed[-1] == 30.0
    assert set(armed[1:-1]) == {1.0}


def test_who_is_silent() -> None:
    now = [0.0]
    heard = Heard(10.0, lambda: now[0])
    heard.note("a")
    now[0] = 8.0
    heard.note("b")
    assert not heard.silent(["a", "b"])
    now[0] = 12.0
    assert heard.silent(["a"])
    assert not heard.silent(["a", "b"])
    assert not heard.silent([])
    assert not heard.silent(["a", "stranger"]), "who never sent a request is of no service that counts"
    now[0] = 19.0
    assert heard.silent(["a", "b"])
    heard.note("a")
    assert not heard.silent(["a", "b"])
    in_one_process = Heard(math.inf, lambda: now[0])
    in_one_process.note("a")
    now[0] = 1e9
    assert not in_one_process.silent(["a"])


def test_a_barrier_keeps_its_expected_through_an_outage() -> None:
    heard, fired = Silence(), list[dict[str, int]]()
    barrier: Barrier[int] = Barrier(SOON, fired.append, heard)
    barrier.expect({"a", "b"})
    barrier.arrive("a", 1)
    until(lambda: heard.asked > 2)
    assert not fired
    barrier.arrive("b", 2)
    assert fired == [{"a": 1, "b": 2}]
    assert barrier.expected == {"a", "b"}
    barrier.arrive("a", 3)
    heard.now = False
    until(lambda: len(fired) == 2)
    assert fired[1] == {"a": 3}


def test_the_clock_of_a_barrier_that_was_dropped_ends() -> None:
    """In a round that was lost for good nobody is heard any more."""
    heard = Silence()
    barrier: Barrier[int] = Barrier(SOON, lambda arrived: None, heard)
    barrier.expect({"a", "b"})
    barrier.arrive("a", 1)
    until(lambda: heard.asked > 1)
    assert heard.seen[-1] == ("a",)
    del barrier
    gc.collect()
    until(lambda: () in heard.seen)
