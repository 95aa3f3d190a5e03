"""How soon the shipped fast recipe is where FedAvg ends. A part of ``make bench-federation``.

FedAvg trains both factors of every part's adapter with AdamW and averages them by examples, at the best of a few
learning rates. The fast recipe has the same rows, batches and local steps.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from benchmarks.common.results import Results
from benchmarks.common.tasks import Values
from benchmarks.federated.corpora import OPINING, SPEAKING, Corpus
from benchmarks.federated.learning import merged
from benchmarks.federated.trials import Trial, shipped, tried

LESS = 30.0
"""Percent of FedAvg's time that is to be saved at least."""


@dataclass(frozen=True)
class Race:
    """What both recipes are to learn."""

    name: str
    corpus: Corpus
    silos: int
    train: Values
    rates: tuple[float, ...]
    """FedAvg's best learning rate is looked for among these, with the first seed."""
    fast: Values
    """What the fast recipe needs for this model: the learning rate, and rounds to spare."""
    every: int
    """Rounds between measurements."""
    seeds: tuple[int, ...]

    def run(self, changes: Values, seed: int = 0) -> Trial:
        return tried(self.corpus, changes, silos=self.silos, seed=seed, every=self.every)

    def plain(self, rate: float) -> Values:
        return {"train": {**self.train, "learning_rate": rate}, "federation": {"lora": "plain"}}


RACES = (
    Race(
        "speakers",
        SPEAKING,
        10,
        {"rounds": 16, "steps": 5},
        (5e-3, 1e-2, 2e-2),
        {"rounds": 22, "steps": 5, "learning_rate": 1e-2},
        every=2,
        seeds=(0, 1, 2),
    ),
    Race(
        "opinions",
        OPINING,
        4,
        {"rounds": 6, "steps": 3},
        (5e-4, 1e-3),
        {"rounds": 12, "steps": 3, "batch": 2, "learning_rate": 1e-3},
        every=3,
        seeds=(0, 1, 2),
    ),
)


def speakers(results: Results) -> None:
    compare(results, RACES[0])


def opinions(results: Results) -> None:
    compare(results, RACES[1])


def compare(results: Results, race: Race) -> None:
    swept = {rate: race.run(race.plain(rate)) for rate in race.rates}
    for rate, trial in swept.items():
        what = f"{race.name}, FedAvg at learning rate {rate:g}, seed {race.seeds[0]}"
        results.add(f"{what}: loss", trial.final.loss, "nats")
    best = min(swept, key=lambda rate: swept[rate].final.loss)
    fedavg = [swept[best], *(race.run(race.plain(best), seed) for seed in race.seeds[1:])]
    fast = merged(shipped("fast-federation"), {"train": race.fast})
    pairs = [(before, race.run(fast, seed)) for before, seed in zip(fedavg, race.seeds, strict=True)]
    for what, of in (("loss", lambda one: one.final.loss), ("accuracy", lambda one: 100 * one.final.accuracy)):
        for name, place in (("FedAvg", 0), ("fast", 1)):
            note(results, f"{race.name}, {name}: {what} after all rounds", [of(pair[place]) for pair in pairs], "")
    targets = [before.final.loss for before, _ in pairs]
    rounds = [after.rounds_to(target) for (_, after), target in zip(pairs, targets, strict=True)]
    note(results, f"{race.name}, fast: rounds to FedAvg's loss after {race.train['rounds']}", rounds, "rounds")
    for how, summed in (("side by side", False), ("summed", True)):
        whole = [before.seconds(race.train["rounds"], summed=summed) for before, _ in pairs]
        needed = [after.seconds(count, summed=summed) for (_, after), count in zip(pairs, rounds, strict=True)]
        note(results, f"{race.name}, FedAvg: time, {how}", whole, "s")
        note(results, f"{race.name}, fast: time to FedAvg's loss, {how}", needed, "s")
        saved = [100 * (1 - one / all) for one, all in zip(needed, whole, strict=True)]
        note(results, f"{race.name}: time saved, {how}", saved, "%", at_least=None if summed else LESS)


def note(results: Results, measure: str, values: list[float], unit: str, *, at_least: float | None = None) -> None:
    """The mean, and how far the seeds lie apart."""
    results.add(measure, statistics.fmean(values), unit, at_least=at_least)
    if len(values) > 1:
        results.add(f"{measure}, range of {len(values)} seeds", max(values) - min(values), unit)
