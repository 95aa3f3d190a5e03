"""The worst silo of a federation whose silos differ, with FedAvg's weights and with the shipped fair recipe.

A part of ``make bench-federation``. Nine silos are Shakespearean speakers, the tenth has news; stories260k. Mean,
deviation and the worst are over silos, each of which counts for one.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

from benchmarks.common.results import Results, note
from benchmarks.common.rows import Values
from benchmarks.federated.corpora import SPEAKING, mixed
from benchmarks.federated.simulation import merged
from benchmarks.federated.trials import Trial, shipped, tried

UNLIKE = replace(SPEAKING, files=mixed)
SILOS, SEEDS = 10, (0, 1, 2)
TRAIN = {"rounds": 16, "steps": 5, "learning_rate": 1e-2}
MARGIN, MEAN = 3.0, 1.0
"""Points that the worst silo is to gain at least, and that the mean may lose at most."""


def measure(results: Results) -> None:
    fedavg, fair = ([tried(UNLIKE, one, silos=SILOS, seed=seed) for seed in SEEDS] for one in recipes())
    for name, trials in (("FedAvg", fedavg), ("fair", fair)):
        for what, (of, unit) in MEASURES.items():
            note(results, f"fairness, {name}: {what}", [of(trial) for trial in trials], unit)
    gained = [worst(after) - worst(before) for before, after in zip(fedavg, fair, strict=True)]
    lost = [mean(before) - mean(after) for before, after in zip(fedavg, fair, strict=True)]
    note(results, "fairness: what the worst silo gains", gained, "points", at_least=MARGIN)
    note(results, "fairness: what the mean loses", lost, "points", at_most=MEAN)


def recipes() -> tuple[Values, Values]:
    """FedAvg's, and the shipped one, which differs by its fairness alone."""
    fair = merged(shipped("fair"), {"train": TRAIN})
    federation = {key: value for key, value in fair["federation"].items() if key != "fairness"}
    return {**fair, "federation": federation}, fair


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
