"""Result rows: goals, rounding, and rows of earlier runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common import results
from benchmarks.common.results import Results, Row, note, repeated


def added(value: float, **goal: float) -> Row:
    found = Results("name", "make bench-name")
    found.add("measure", value, "s", **goal)
    (row,) = found.rows
    return row


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [
        (2.0, {"at_most": 2.0}, True),
        (2.01, {"at_most": 2.0}, False),
        (2.0, {"at_least": 2.0}, True),
        (1.99, {"at_least": 2.0}, False),
        (0.5, {"at_most": 0.0}, False),
        (0.0, {"at_least": 0.0}, True),
        (1.0, {}, None),
    ],
)
def test_met_is_whether_the_goal_is(value: float, goal: dict[str, float], met: bool | None) -> None:
    row = added(value, **goal)
    assert row.met is met
    assert (row.goal is None) == (met is None)


def test_a_value_that_only_rounds_to_its_goal_misses_it() -> None:
    row = added(2.00001, at_most=2.0)
    assert (row.value, row.met) == (2.0, False)


def test_goals_say_their_direction() -> None:
    assert added(1.0, at_most=2.0).goal == "≤ 2.0"
    assert added(1.0, at_least=2.0).goal == "≥ 2.0"


def test_an_infinite_value_has_no_number() -> None:
    row = added(float("inf"), at_most=1.0)
    assert (row.value, row.met) == (None, False)


def test_note_gives_mean_and_range() -> None:
    found = Results("name", "make bench-name")
    note(found, "speed", [1.0, 2.0, 6.0], "s", at_most=2.5)
    assert [(row.measure, row.value, row.met) for row in found.rows] == [
        ("speed", 3.0, False),
        ("speed, range of 3 seeds", 5.0, None),
    ]


def test_rows_of_earlier_runs_are_kept_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for measures, value, keep in (("ab", 1.0, False), ("bc", 2.0, True)):
        found = Results("name", "make bench-name")
        for measure in measures:
            found.add(measure, value, "s")
        path = found.write(keep=keep)
    rows = json.loads(path.read_text())
    assert [(row["measure"], row["value"]) for row in rows] == [("a", 1.0), ("b", 2.0), ("c", 2.0)]
    assert list(rows[0]) == ["measure", "value", "unit", "goal", "met", "command", "hardware", "date"]


def test_repeated_gives_median_lowest_and_highest() -> None:
    found = Results("name", "make bench-name")
    repeated(found, "memory", [5.0, 1.0, float("inf")], "s", at_most=5)
    assert [(row.measure, row.value, row.met) for row in found.rows] == [
        ("memory", 5.0, True),
        ("memory, lowest of 3", 1.0, None),
        ("memory, highest of 3", None, None),
    ]


def test_a_measure_in_another_number_of_runs_replaces_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for values in ([1.0, 2.0], [1.0, 2.0, 6.0], [4.0]):
        found = Results("name", "make bench-name")
        note(found, "speed", values, "s")
        found.write(keep=True)
    assert found.known() == {"speed": 4.0}
    assert [row["measure"] for row in json.loads((tmp_path / "name.json").read_text())] == ["speed"]
