"""Processor time that the shipped fast recipe needs to reach FedAvg's final loss. A part of ``make bench-federation``.

FedAvg trains both factors of every part's adapter with AdamW and averages them by examples. The fast recipe has the
same rows, batches and local steps. Learning rates of both are chosen among the same candidates, on validation rows
that neither trains on; what is reported is measured on other rows, which nothing was chosen on.

Time is simulated: the threads' own processor time, without any network. *Side by side* is as if each silo had a
machine, *summed* is the work of all (``simulation``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.results import Results, note
from benchmarks.common.rows import Values
from benchmarks.federated.corpora import OPINING, SPEAKING, Corpus, with_validation
from benchmarks.federated.simulation import merged
from benchmarks.federated.trials import Trial, shipped, tried

LESS = 30.0
"""Percent of FedAvg's time that is to be saved at least."""


TIME = "simulated processor time without network"


@dataclass(frozen=True)
class Race:
    """A task for both recipes."""

    name: str
    corpus: Corpus
    silos: int
    train: Values
    """Of FedAvg."""
    fast: Values
    """Of the fast recipe, with more rounds than it should need."""
    rates: tuple[float, ...]
    """Candidate learning rates of both; each recipe's is chosen with the first seed."""
    every: int
    """Rounds between measurements."""
    seeds: tuple[int, ...]

    def recipes(self) -> dict[str, Values]:
        """Both, without learning rates."""
        return {
            "FedAvg": {"train": self.train, "federation": {"lora": "plain"}},
            "fast": merged(shipped("fast-federation"), {"train": self.fast}),
        }

    def run(self, corpus: Corpus, recipe: Values, rate: float, seed: int) -> Trial:
        changes = merged(recipe, {"train": {"learning_rate": rate}})
        return tried(corpus, changes, silos=self.silos, seed=seed, every=self.every)


RACES = (
    Race(
        "speakers",
        SPEAKING,
        10,
        {"rounds": 16, "steps": 5},
        {"rounds": 22, "steps": 5},
        (5e-3, 1e-2, 2e-2),
        every=2,
        seeds=(0, 1, 2),
    ),
    Race(
        "opinions",
        OPINING,
        4,
        {"rounds": 6, "steps": 3},
        {"rounds": 12, "steps": 3, "batch": 2},
        (5e-4, 1e-3, 2e-3),
        every=3,
        seeds=(0, 1, 2),
    ),
)


def speakers(results: Results) -> None:
    compare(results, RACES[0])


def opinions(results: Results) -> None:
    compare(results, RACES[1])


def compare(results: Results, race: Race) -> None:
    choosing, reporting = with_validation(race.corpus)
    trials: dict[str, list[Trial]] = {}
    for name, recipe in race.recipes().items():
        losses = {rate: race.run(choosing, recipe, rate, race.seeds[0]).final.loss for rate in race.rates}
        for rate, loss in losses.items():
            results.add(f"{race.name}, {name} at learning rate {rate:g}: loss of validation rows", loss, "nats")
        best = min(losses, key=losses.__getitem__)
        trials[name] = [race.run(reporting, recipe, best, seed) for seed in race.seeds]
    report(results, race.name, trials["FedAvg"], trials["fast"])


def report(results: Results, race: str, fedavg: Sequence[Trial], fast: Sequence[Trial]) -> None:
    """Both after all their rounds, and the fast recipe's rounds and time to FedAvg's final loss, seed by seed."""
    for what, of in (("loss", lambda one: one.final.loss), ("accuracy", lambda one: 100 * one.final.accuracy)):
        for name, trials in (("FedAvg", fedavg), ("fast", fast)):
            note(results, f"{race}, {name}: {what} after all rounds", [of(trial) for trial in trials], "")
    whole = max(fedavg[0].scores)
    pairs = list(zip(fedavg, fast, strict=True))
    rounds = [after.rounds_to(before.final.loss) for before, after in pairs]
    note(results, f"{race}, fast: rounds to FedAvg's loss after {whole}", rounds, "rounds")
    for how, summed in (("side by side", False), ("summed", True)):
        spent = [before.seconds(whole, summed=summed) for before in fedavg]
        needed = [after.seconds(count, summed=summed) for after, count in zip(fast, rounds, strict=True)]
        note(results, f"{race}, FedAvg: {TIME}, {how}", spent, "s")
        note(results, f"{race}, fast: {TIME} to FedAvg's loss, {how}", needed, "s")
        saved = [100 * (1 - one / all) for one, all in zip(needed, spent, strict=True)]
        note(results, f"{race}: {TIME} saved, {how}", saved, "%", at_least=None if summed else LESS)
