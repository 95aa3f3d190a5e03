"""Scores of answers."""

from __future__ import annotations

import pytest

from isthmus.tasks.metrics import accuracy, majority


@pytest.mark.parametrize(
    ("predicted", "right", "share"),
    [([1], [1], 1.0), ([1], [2], 0.0), ([(1, 2), (3,)], [(1, 2), (4,)], 0.5), ("abca", "abba", 0.75)],
)
def test_accuracy_is_the_share_of_equal_pairs(predicted: list[object], right: list[object], share: float) -> None:
    assert accuracy(predicted, right) == share


def test_accuracy_needs_pairs() -> None:
    with pytest.raises(ValueError, match="argument"):
        accuracy([1, 2], [1])


@pytest.mark.parametrize(("right", "share"), [("a", 1.0), ("aab", 2 / 3), ("ab", 0.5), ([(1,), (1,), (2,)], 2 / 3)])
def test_majority_is_the_share_of_the_commonest(right: list[object], share: float) -> None:
    assert majority(right) == share
