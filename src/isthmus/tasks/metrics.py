"""How good a model's answers are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def accuracy(predicted: Sequence[object], right: Sequence[object]) -> float:
    """Share of equal pairs, 0 to 1."""
    return sum(one == other for one, other in zip(predicted, right, strict=True)) / len(right)


def majority(right: Sequence[object]) -> float:
    """Accuracy of always giving the most common answer."""
    return Counter(right).most_common(1)[0][1] / len(right)
