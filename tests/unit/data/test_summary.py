"""Summaries of rows: lengths, answers, warnings, duplicates by place."""

from __future__ import annotations

import statistics

import pytest

from isthmus.data.row_set import RowSet
from isthmus.data.summary import Duplicate, find_duplicates, set_warnings, summarize_set
from isthmus.data.templates import Example
from isthmus.data.tokens import Tokens


def row_set(*texts: tuple[str, str], name: str = "f", **counts: int) -> RowSet:
    rows = [Tokens([1] * len(prompt), [2]) for prompt, _ in texts]
    placed = [(f"{name}:{number}", Example(prompt, answer)) for number, (prompt, answer) in enumerate(texts, 1)]
    return RowSet(rows, placed, [len(row.prompt) + 1 for row in rows], **counts)


def test_lengths_are_those_of_all_rows() -> None:
    rows = row_set(*(("x" * number, "a") for number in range(1, 101)), skipped=25, truncated=50)
    summary = summarize_set(rows, ("a", "b"))
    assert summary.lengths is not None
    assert (summary.lengths.least, summary.lengths.most) == (2, 101)
    assert summary.lengths.median == statistics.median(rows.lengths)
    assert 95 < summary.lengths.p95 < 98
    assert (summary.skipped_share, summary.truncated_share) == (0.2, 0.5)


def test_answers_are_counted_where_they_are_few() -> None:
    rows = row_set(("p", "no"), ("q", "yes"), ("r", "yes"), ("s", "no"), ("t", "yes"))
    assert summarize_set(rows, ("no", "maybe", "yes")).answers == {"no": 2, "maybe": 0, "yes": 3}
    assert list(summarize_set(rows, ()).answers.items()) == [("yes", 3), ("no", 2)]
    assert summarize_set(row_set(("p", "a"), ("q", "b")), ()).answers == {}
    assert summarize_set(row_set(), ("no",)).lengths is None


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ([], "train: no row is left"),
        ([("p", "yes"), ("q", "yes")], "all 2 training rows have one answer, 'yes'"),
        ([("p", "yes"), ("p ", "no"), ("q", "no")], "train: 1 of 3 rows repeat the prompt"),
    ],
)
def test_what_to_look_at_is_said(texts: list[tuple[str, str]], told: str) -> None:
    (warning,) = set_warnings("train", row_set(*texts))
    assert told in warning


def test_nothing_is_said_of_usual_rows() -> None:
    assert set_warnings("train", row_set(("p", "yes"), ("q", "no"))) == []
    assert set_warnings("held out", row_set()) == []


def test_held_out_rows_that_are_all_too_long_are_noticed() -> None:
    assert set_warnings("held out", RowSet([], [], [700], skipped=1)) == ["held out: no row is left"]


def test_a_prompt_in_two_places_is_named_by_both() -> None:
    found = find_duplicates(
        [
            ("a", "train", row_set(("one  x", "1"), ("two", "2"), ("own", "3"), ("own", "3"), name="at")),
            ("a", "held out", row_set(("test", "1"), name="ah")),
            ("b", "train", row_set(("two", "2"), ("three", "3"), name="bt")),
            ("b", "held out", row_set(("one\nx ", "1"), ("test", "1"), name="bh")),
        ]
    )
    assert found == [
        Duplicate("train and held out", ["a, train: at:1", "b, held out: bh:1"]),
        Duplicate("several silos", ["a, train: at:2", "b, train: bt:1"]),
    ]
