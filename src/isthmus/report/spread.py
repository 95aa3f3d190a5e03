"""How evenly a federation serves its silos: the worst of them, how far they lie apart, and what each has gained."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from isthmus.report.progress import SiloProgress

Measure = Literal["accuracy", "loss"]


@dataclass(frozen=True)
class Spread:
    """Held-out scores after the last round that all silos have measured."""

    round: int
    measure: Measure
    silo: str
    """The worst one."""
    worst: float
    """Its score."""
    mean: float
    deviation: float
    """The standard deviation over the silos."""
    gains: Mapping[str, float]
    """How much better each silo is served than before the first round, where it measured then; below 0: worse."""


def spread_of(silos: Sequence[SiloProgress]) -> Spread | None:
    """None if there is no round that all of them have measured alike."""
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
    """The value with the sign that makes more of it better."""
    return value if measure == "accuracy" else -value
