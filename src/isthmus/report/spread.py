"""Fairness over silos: the worst held-out score, the standard deviation, and each silo's gain."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from isthmus.report.progress import SiloStatus

Measure = Literal["accuracy", "loss"]


@dataclass(frozen=True)
class Spread:
    """Held-out scores of all silos after one round."""

    round: int
    """Number of finished rounds: the last after which all silos have a score."""
    measure: Measure
    silo: str
    """The silo with the worst score."""
    worst: float
    """The worst score."""
    mean: float
    deviation: float
    """Standard deviation over the silos."""
    gains: Mapping[str, float]
    """Improvement over the score before the first round by silo, negative if the score is worse; silos without a score
    before the first round are absent."""


def spread_of(silos: Sequence[SiloStatus]) -> Spread | None:
    """The spread after the last round for which all silos have a score of one measure; None if there is none."""
    rounds = set.intersection(*(set(silo.scores) for silo in silos))
    if not rounds:
        return None
    last = max(rounds)
    measure: Measure = "accuracy" if "accuracy" in silos[0].scores[last] else "loss"
    if not all(measure in silo.scores[last] for silo in silos):
        return None
    scores = {silo.name: silo.scores[last][measure] for silo in silos}
    worst = min(scores, key=lambda name: _better(measure, scores[name]))
    gains = {
        silo.name: _better(measure, scores[silo.name] - silo.scores[0][measure])
        for silo in silos
        if measure in silo.scores.get(0, {})
    }
    values = list(scores.values())
    return Spread(last, measure, worst, scores[worst], statistics.fmean(values), statistics.pstdev(values), gains)


def _better(measure: Measure, value: float) -> float:
    """The value, negated for a loss, so that more is better."""
    return value if measure == "accuracy" else -value
