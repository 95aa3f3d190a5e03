"""The worst silo of a federation whose silos differ, with FedAvg's weights and with the shipped fair recipe.

A part of ``make bench-federation``. Nine silos are Shakespearean speakers, the tenth has news; stories260k. Mean,
deviation and the worst are over silos, each of which counts for one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

from benchmarks.common.results import Results
from benchmarks.common.tasks import Values
from benchmarks.federated.corpora import SPEAKING, mixed
from benchmarks.federated.learning import merged
from benchmarks.federated.trials import Trial, shipped, tried

UNLIKE = replace(SPEAKING, files=mixed)
SILOS, SEEDS = 10, (0, 1, 2)
TRAIN = {"rounds": 16, "steps": 5, "learning_rate": 1e-2}
MARGIN, MEAN = 1.0, 1.0
"""Points that the worst silo is to gain at least, and that the mean may lose at most."""


def measure(results: Results) -> None:
    fedavg, fair = ([tried(UNLIKE, one, silos=SILOS, seed=seed) for seed in SEEDS] for one in recipes())
    for name, trials in (("FedAvg", fedavg), ("fair", fair)):
        for what, (of, unit) in MEASURES.items():
            found = [of(trial) for trial in trials]
            results.add(f"fairness, {name}: {what}", statistics.fmean(found), unit)
            results.add(f"fairness, {name}: {what}, range of {len(SEEDS)} seeds", max(found) - min(found), unit)
    gained, lost = (gain(of, fedavg, fair) for of in (worst, mean))
    results.add("fairness: what the worst silo gains", gained, "points", at_least=MARGIN)
    results.add("fairness: what the mean loses", -lost, "points", at_most=MEAN)


def recipes() -> tuple[Values, Values]:
    """FedAvg's, and the shipped one, which differs by its fairness alone."""
    fair = merged(shipped("fair"), {"train": TRAIN})
    federation = {key: value for key, value in fair["federation"].items() if key != "fairness"}
    return {**fair, "federation": federation}, fair


def gain(of: Callable[[Trial], float], before: list[Trial], after: list[Trial]) -> float:
    return statistics.fmean(map(of, after)) - statistics.fmean(map(of, before))


def accuracies(trial: Trial) -> list[float]:
    return [100 * one.accuracy for one in trial.last.values()]


def worst(trial: Trial) -> float:
    return min(accuracies(trial))


def worst_loss(trial: Trial) -> float:
    return max(one.loss for one in trial.last.values())


def mean(trial: Trial) -> float:
    return statistics.fmean(accuracies(trial))


def deviation(trial: Trial) -> float:
    return statistics.pstdev(accuracies(trial))


MEASURES = {
    "worst silo's accuracy": (worst, "points"),
    "worst silo's loss": (worst_loss, "nats"),
    "mean of silos' accuracies": (mean, "points"),
    "deviation of silos' accuracies": (deviation, "points"),
}
