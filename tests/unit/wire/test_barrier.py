"""The barrier: who is waited for, for how long, and that nothing is handed out twice or lost."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from isthmus.wire.barrier import Barrier

LONG, SHORT, HANG = 600.0, 0.05, 30.0
Groups = queue.SimpleQueue[dict[str, int]]


def build(*expected: str, patience: float = LONG) -> tuple[Barrier[int], Groups]:
    groups: Groups = queue.SimpleQueue()
    barrier: Barrier[int] = Barrier(patience, groups.put)
    barrier.expect(expected)
    return barrier, groups


def test_fires_when_all_have_come() -> None:
    barrier, groups = build("a", "b", "c")
    barrier.arrive("b", 2)
    barrier.arrive("a", 1)
    assert groups.empty()
    barrier.arrive("c", 3)
    assert groups.get(timeout=HANG) == {"a": 1, "b": 2, "c": 3}


def test_fires_again_and_again() -> None:
    barrier, groups = build("a", "b")
    for number in range(20):
        barrier.arrive("a", number)
        assert groups.empty()
        barrier.arrive("b", -number)
        assert groups.get(timeout=HANG) == {"a": number, "b": -number}


def test_nothing_fires_while_nobody_has_come() -> None:
    barrier, groups = build("a", "b")
    barrier.expect(())
    barrier.dismiss("a")
    assert groups.empty()


def test_patience_ends_with_those_present() -> None:
    barrier, groups = build("a", "b", "c", patience=SHORT)
    barrier.arrive("a", 1)
    barrier.arrive("b", 2)
    assert groups.get(timeout=HANG) == {"a": 1, "b": 2}
    assert barrier.expected == {"a", "b"}


def test_the_missing_one_is_not_waited_for_until_it_comes_again() -> None:
    barrier, groups = build("a", "b", patience=SHORT)
    barrier.arrive("a", 1)
    groups.get(timeout=HANG)
    barrier._patience = LONG
    barrier.arrive("a", 2)
    assert groups.get(timeout=HANG) == {"a": 2}
    barrier.arrive("b", 3)
    assert groups.empty(), "both are expected again"
    barrier.arrive("a", 4)
    assert groups.get(timeout=HANG) == {"a": 4, "b": 3}


def test_patience_of_an_earlier_group_does_not_end_the_next() -> None:
    barrier, groups = build("a", "b", patience=SHORT)
    barrier.arrive("a", 1)
    barrier.arrive("b", 2)
    groups.get(timeout=HANG)
    barrier._patience = LONG
    barrier.arrive("a", 3)
    with pytest.raises(queue.Empty):
        groups.get(timeout=4 * SHORT)


def test_dismiss_completes() -> None:
    barrier, groups = build("a", "b")
    barrier.arrive("a", 1)
    barrier.dismiss("b")
    assert groups.get(timeout=HANG) == {"a": 1}
    assert barrier.expected == {"a"}


def test_dismiss_of_one_of_two_missing_does_not_complete() -> None:
    barrier, groups = build("a", "b", "c")
    barrier.arrive("a", 1)
    barrier.dismiss("b")
    assert groups.empty()


def test_an_item_that_comes_twice_replaces_the_first() -> None:
    barrier, groups = build("a", "b")
    barrier.arrive("a", 1)
    barrier.arrive("a", 2)
    barrier.arrive("b", 3)
    assert groups.get(timeout=HANG) == {"a": 2, "b": 3}
    assert groups.empty()


def test_expecting_fewer_completes_at_once() -> None:
    barrier, groups = build("a", "b", "c")
    barrier.arrive("a", 1)
    barrier.arrive("b", 2)
    barrier.expect(("a",))
    assert groups.get(timeout=HANG) == {"a": 1, "b": 2}


def test_one_who_was_not_expected_is_from_then_on() -> None:
    barrier, groups = build("a")
    barrier.arrive("b", 1)
    assert groups.empty()
    barrier.arrive("a", 2)
    assert groups.get(timeout=HANG) == {"a": 2, "b": 1}


def test_fire_may_use_the_barrier() -> None:
    done: Future[dict[str, int]] = Future()
    barrier: Barrier[int] = Barrier(LONG, lambda arrived: (barrier.expect(("a", "b")), done.set_result(arrived)))
    barrier.arrive("a", 1)
    assert done.result(HANG) == {"a": 1}
    assert barrier.expected == {"a", "b"}


def test_timers_end_with_their_group() -> None:
    barrier, _ = build("a")
    before = threading.active_count()  # tests that leave a group open leave a timer
    for number in range(100):
        barrier.arrive("a", number)
    end = time.monotonic() + HANG
    while threading.active_count() > before:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("patience", [LONG, 0.001])
def test_each_item_is_handed_out_once_among_threads(patience: float) -> None:
    peers = [f"silo {number}" for number in range(6)]
    given: list[Future[int]] = []

    def hand_out(arrived: dict[str, Future[int]]) -> None:
        for item in arrived.values():
            item.set_result(1)  # raises when an item comes twice
            given.append(item)

    barrier: Barrier[Future[int]] = Barrier(patience, hand_out)
    barrier.expect(peers)

    def take_part(peer: str) -> None:
        for _ in range(100):
            item: Future[int] = Future()
            barrier.arrive(peer, item)
            item.result(HANG)

    with ThreadPoolExecutor(len(peers)) as threads:
        list(threads.map(take_part, peers))
    assert len(given) == len({id(item) for item in given}) == 600
