"""Progress is what the journals say, over all processes that a silo has had."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from isthmus.report.progress import SiloStatus, read_progress
from isthmus.storage.record import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def step(round: int, number: int, **more: Any) -> dict[str, Any]:
    counted = {"loss": 2.0, "tokens": 10, "seconds": 0.5, "sent_bytes": 0, "received_bytes": 0, "epsilon": None}
    return {"event": "step", "round": round, "step": number, **counted, **more}


def noted(run: RunDirectory, *lines: dict[str, Any]) -> SiloStatus:
    journal = run.role("a").journal("metrics")
    for line in lines:
        journal.append(line)
    return read_progress(run, "a", 4)


def test_before_the_first_step_there_is_nothing(run: RunDirectory) -> None:
    assert read_progress(run, "a", 4) == SiloStatus("a")


def test_steps_are_counted_over_rounds_and_rows_over_steps(run: RunDirectory) -> None:
    found = noted(run, step(1, 4, skipped=2), step(2, 3, loss=1.0, epsilon=7.0, skipped=1))
    assert (found.steps, found.loss, found.epsilon, found.skipped) == (7, 1.0, 7.0, 3)


def test_an_epsilon_without_a_bound_is_infinite(run: RunDirectory) -> None:
    assert noted(run, step(1, 1)).epsilon == math.inf


def test_the_pace_is_that_of_the_last_ten_steps(run: RunDirectory) -> None:
    slow, fast = step(1, 1, seconds=100.0), step(1, 1, seconds=1.0)
    assert noted(run, *[slow] * 5, *[fast] * 10).tokens_per_second == 10.0


def test_counters_that_begin_again_with_a_process_are_summed(run: RunDirectory) -> None:
    found = noted(run, *(step(1, 1, sent_bytes=size, received_bytes=2 * size) for size in (10, 30, 5, 7)))
    assert (found.sent_bytes, found.received_bytes) == (37, 74)


def test_updates_count_among_what_was_sent(run: RunDirectory) -> None:
    update = {"event": "update", "round": 1, "own_sent_bytes": 100, "own_received_bytes": 1000}
    found = noted(run, step(1, 1, sent_bytes=10, received_bytes=20), update, step(2, 1, sent_bytes=15), update)
    assert (found.sent_bytes, found.received_bytes) == (215, 2020)


def test_a_silo_learned_once_a_step_had_a_row(run: RunDirectory) -> None:
    assert not noted(run, step(1, 1, loss=None)).learned
    assert noted(run, step(1, 2), step(1, 3, loss=None)).learned


def test_scores_are_by_round_and_other_figures_no_scores(run: RunDirectory) -> None:
    found = noted(run, {"event": "evaluation", "round": 2, "seconds": 1.0, "accuracy": 0.5, "loss": 1.5})
    assert found.scores == {2: {"accuracy": 0.5, "loss": 1.5}}


def test_a_line_without_its_event_is_refused(run: RunDirectory) -> None:
    with pytest.raises(KeyError, match="event"):
        noted(run, {"round": 1})
