"""Scores against slow, obvious oracles, over random rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.attacks.score import MEASURES, aligned_guess, score, share
from isthmus.errors import AttackError
from tests.unit.attacks.attacked import say

ROW = st.lists(st.integers(0, 6), min_size=1, max_size=9)
PAIRS = st.lists(st.tuples(ROW, ROW), min_size=1, max_size=5)


def rouge_n(truth: Sequence[int], guess: Sequence[int], n: int) -> float:
    one, two = (Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1)) for row in (truth, guess))
    shared = sum(min(count, two[gram]) for gram, count in one.items())
    return 2 * shared / (one.total() + two.total()) if shared else 0.0


def rouge_l(truth: Sequence[int], guess: Sequence[int]) -> float:
    @cache
    def longest(i: int, j: int) -> int:
        if i == len(truth) or j == len(guess):
            return 0
        if truth[i] == guess[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return 2 * longest(0, 0) / (len(truth) + len(guess))


def bleu(truth: Sequence[int], guess: Sequence[int]) -> float:
    """BLEU-4 of one sentence: orders that the guess is too short for left out, empty ones halved again and again."""
    logs, halving = [], 1.0
    for n in range(1, 5):
        one, two = (Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1)) for row in (truth, guess))
        if not two:
            break
        shared = sum(min(count, one[gram]) for gram, count in two.items())
        if not shared:
            halving *= 2
        logs.append(math.log((shared or 1 / halving) / two.total()))
    if not set(truth) & set(guess):
        return 0.0
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - len(truth) / len(guess)))


@given(PAIRS)
@settings(max_examples=60, deadline=None)
def test_figures_are_the_oracles(pairs: list[tuple[list[int], list[int]]]) -> None:
    truth, guess = [one for one, _ in pairs], [(two * 9)[: len(one)] for one, two in pairs]
    figures = score(truth, guess, say, resamples=20)
    rows = list(zip(truth, guess, strict=True))
    hits = sum(one == two for row, other in rows for one, two in zip(row, other, strict=True))
    assert figures["token_accuracy"].value == pytest.approx(hits / sum(map(len, truth)))
    assert figures["exact_match"].value == pytest.approx(sum(one == two for one, two in rows) / len(rows))
    for n in (1, 2):
        expected = sum(rouge_n(one, two, n) for one, two in rows) / len(rows)
        assert figures[f"rouge{n}"].value == pytest.approx(expected)
    assert figures["rougeL"].value == pytest.approx(sum(rouge_l(one, two) for one, two in rows) / len(rows))
    assert figures["bleu4"].value == pytest.approx(sum(bleu(one, two) for one, two in rows) / len(rows), abs=1e-6)
    assert all(0 <= one.low <= one.high <= 1 + 1e-9 for one in figures.values())


@given(ROW, ROW)
@settings(max_examples=100, deadline=None)
def test_a_guess_is_laid_where_it_agrees_most(truth: list[int], guess: list[int]) -> None:
    found = aligned_guess(truth, guess)
    left = sum(one == two for one, two in zip(truth, guess, strict=False))
    right = sum(one == two for one, two in zip(truth[::-1], guess[::-1], strict=False))
    assert len(found) == len(truth)
    assert sum(one == two for one, two in zip(truth, found, strict=True)) == max(left, right)


def test_the_truth_scores_one_and_a_row_is_a_row_in_the_intervals() -> None:
    rows = [[1, 2, 3, 4, 5], [6, 7, 8, 9]]
    assert all((one.value, one.low, one.high) == pytest.approx((1, 1, 1)) for one in score(rows, rows, say).values())
    half = score(rows, [rows[0], [0, 0, 0, 0]], say)
    assert (half["exact_match"].low, half["exact_match"].value, half["exact_match"].high) == (0.0, 0.5, 1.0)
    assert set(half) == set(MEASURES)


def test_none_of_twenty_is_not_none_at_all() -> None:
    """The exact interval: 1 - 0.025^(1/20) is the largest share that shows none in twenty once in forty times."""
    none, all_ = share([False] * 20), share([True] * 20)
    assert (none.value, none.low, none.high) == pytest.approx((0.0, 0.0, 1 - 0.025 ** (1 / 20)))
    assert (all_.value, all_.low, all_.high) == pytest.approx((1.0, 0.025 ** (1 / 20), 1.0))


def test_only_masked_tokens_count() -> None:
    truth, guess = [[1, 2, 3, 4], [5, 6, 7]], [[1, 0, 3, 0], [0, 0, 0]]
    masks = [[True, False, True, False], [False, False, False]]
    figures = score(truth, guess, say, only=masks)
    assert {name: figures[name].value for name in ("token_accuracy", "exact_match", "rouge1")} == {
        "token_accuracy": 1.0,
        "exact_match": 1.0,
        "rouge1": 1.0,
    }


@pytest.mark.parametrize(
    ("guess", "only", "complaint"),
    [
        ([[1]], None, "1 guesses and 2 masks for 2 rows"),
        ([[1], [2]], [[True]], "2 guesses and 1 masks for 2 rows"),
        ([[1], [2]], [[True], [True, False]], "a mask of 2 for a row of 1 tokens"),
        ([[1], [2]], [[False], [False]], "no token to score"),
    ],
)
def test_what_does_not_fit_is_named(guess: list[list[int]], only: list[list[bool]] | None, complaint: str) -> None:
    with pytest.raises(AttackError, match=complaint):
        score([[1], [2]], guess, say, only=only)
