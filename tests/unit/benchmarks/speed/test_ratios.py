"""Ratios of the speed benchmarks: medians of pairs, their spread, and ratios of medians."""

from __future__ import annotations

import mmap

import pytest
import torch

from benchmarks.common import memory
from benchmarks.common.results import Results
from benchmarks.speed import foundation, sessions


def values(found: Results) -> dict[str, float | None]:
    return {row.measure: row.value for row in found.rows}


def test_ratio_of_steps_is_taken_pair_by_pair() -> None:
    found = Results("name", "make bench-name")
    foundation.report_pairs(found, "step", [(1.0, 1.0), (3.0, 2.0), (8.0, 4.0)], "time, split / uncut", at_most=1.1)
    assert values(found) == {
        "step: split": 3.0,
        "step: uncut": 2.0,
        "step: time, split / uncut": 1.5,
        "step: ratio, lowest pair": 1.0,
        "step: ratio, highest pair": 2.0,
    }
    assert [row.met for row in found.rows if row.goal] == [False]


def test_sessions_state_their_spread_and_the_ratio_of_medians() -> None:
    found = Results("name", "make bench-name")
    sessions.report(found, "trunk", {1: [10.0, 20.0, 40.0], 8: [50.0, 60.0, 80.0]}, {8: 3.0})
    assert values(found) == {
        "trunk: 1 sessions": 20.0,
        "trunk: 1 sessions, lowest repeat": 10.0,
        "trunk: 1 sessions, highest repeat": 40.0,
        "trunk: 8 sessions": 60.0,
        "trunk: 8 sessions, lowest repeat": 50.0,
        "trunk: 8 sessions, highest repeat": 80.0,
        "trunk: 8 sessions against 1": 3.0,
        "trunk: 8 sessions against 1, lowest repeat": 2.0,
        "trunk: 8 sessions against 1, highest repeat": 5.0,
        "trunk: 8 sessions against 1, ratio of medians": 3.0,
    }
    judged = [(row.measure, row.met) for row in found.rows if row.goal]
    assert judged == [("trunk: 8 sessions against 1, ratio of medians", True)]


def test_the_first_repeat_is_left_out() -> None:
    calls: list[int] = []

    def rate(count: int) -> float:
        calls.append(count)
        return float(len(calls))

    assert sessions.measure((1, 8), rate, repeats=2) == {1: [3.0, 5.0], 8: [4.0, 6.0]}


def test_peak_memory_outlives_what_is_freed() -> None:
    slack = 8 * 2**20  # the kernel counts in batches
    before = memory.peak()
    size = before - memory.resident() + 8 * slack
    with mmap.mmap(-1, size) as block:  # what the heap frees it may keep
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        high = memory.resident()
    assert memory.peak() + slack >= high > before
    assert memory.resident() < high - slack


def test_memory_is_above_that_of_an_empty_process(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"empty": 100, "silo": 300, "uncut": 600}
    monkeypatch.setattr(
        foundation,
        "memory_in_a_process",
        lambda kind, run, address: {"peak": sizes[kind] * 10**6, "resident after a step": (sizes[kind] - 50) * 10**6},
    )
    found = Results("name", "make bench-name")
    foundation.measure_memory(found, None, "")  # type: ignore[arg-type]
    assert values(found) == {
        "memory above an empty torch process, peak: silo": 200.0,
        "memory above an empty torch process, peak: uncut": 500.0,
        "memory, peak: silo / uncut": 0.4,
        "memory above an empty torch process, resident after a step: silo": 200.0,
        "memory above an empty torch process, resident after a step: uncut": 500.0,
        "memory, resident after a step: silo / uncut": 0.4,
    }
    assert [(row.measure, row.met) for row in found.rows if row.goal] == [("memory, peak: silo / uncut", True)]


def test_the_peak_is_not_what_a_step_leaves_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([200, 300, 250])
    monkeypatch.setattr(foundation, "step", lambda *args: None)
    monkeypatch.setattr(memory, "resident", lambda: next(left))
    monkeypatch.setattr(memory, "peak", lambda: 400)
    told = foundation.memory_of_training(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    assert told == {"peak": 400, "resident after a step": 300}
