"""Accuracy of a model's answers, and the accuracy that needs no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def accuracy(predicted: Sequence[object], right: Sequence[object]) -> float:
    """Share of predictions that equal the right answer, 0 to 1."""
    return sum(one == other for one, other in zip(predicted, right, strict=True)) / len(right)


def majority(right: Sequence[object]) -> float:
    """Accuracy of a constant prediction, the most common right answer, 0 to 1."""
    return Counter(right).most_common(1)[0][1] / len(right)
