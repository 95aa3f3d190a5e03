"""How seldom the ends may be averaged, and of what: label-skewed silos against one model on all their rows.

Three silos have 24 of hutto's texts each, most of one class of three. All models take the same number of steps on as
many rows a step, at a rate that falls to 0; the federation averages the gradients of bottom and top, or their changes
every step, every other, or every eighth. Learning rates are chosen for each on validation rows of the first draw; what
is reported is measured on rows that nothing else has read, for three draws of all rows, each trained on in two orders.
Time is the threads' own processor time.

``make bench-averaging``, or ``python -m benchmarks.federated.averaging SETTING ...`` for some of the settings.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.common.results import Results, note
from benchmarks.common.rows import SHARED, Rows, Values, read
from benchmarks.federated.corpora import OPINING, Corpus, Files, rows_file
from benchmarks.federated.simulation import merged
from benchmarks.federated.trials import Trial, tried

CLASSES: Mapping[str, Callable[[float], bool]] = {
    "negative": lambda score: score < -1.0,
    "neutral": lambda score: abs(score) < 0.25,
    "positive": lambda score: score > 1.0,
}
SILOS = tuple(f"mostly-{name}" for name in CLASSES)
MOSTLY, OTHERS = 18, 3
"""A silo's rows of its own class, and of each other."""
VALIDATION, UNSEEN = 60, 150
"""Rows of each class to choose by, and to report."""
STEPS, BATCH = 24, 4
RATES = (2e-4, 5e-4, 1e-3, 2e-3)
RUNS = tuple((draw, order) for draw in range(3) for order in range(2))
"""Draws of all rows, and orders of each draw's training rows: these alone move the loss by a tenth."""
POOLED = "pooled"
BELOW = 1.0
"""Points that the federation may be below the pooled model, or one standard error if that is more."""


def rows_of_class(name: str) -> Rows:
    """Short texts of one class, each a row with its label."""
    rows = read(SHARED / "hutto_sentiment" / "all.jsonl")
    return [
        {"text": row["text"], "label": name}
        for row in rows
        if len(row["text"]) <= 160 and CLASSES[name](float(row["score"]))
    ]


def files_of(draw: int, report: bool, folder: Path, silos: int) -> Files:
    """Files of the silos; of one silo those with all rows.

    Args:
        report: hold out the rows to report, or those to choose by.
    """
    train: dict[str, Rows] = {silo: [] for silo in SILOS}
    held_out: Rows = []
    for name in CLASSES:
        drawn = random.Random(f"{draw}/{name}").sample(rows := rows_of_class(name), len(rows))
        for silo in SILOS:
            count = MOSTLY if silo.endswith(name) else OTHERS
            train[silo] += drawn[:count]
            drawn = drawn[count:]
        held_out += drawn[VALIDATION : VALIDATION + UNSEEN] if report else drawn[:VALIDATION]
    if silos == 1:
        train = {POOLED: [row for rows in train.values() for row in rows]}
    files = {silo: {"train": rows_file(folder / f"{silo}.jsonl", rows)} for silo, rows in train.items()}
    first = next(iter(files))  # one silo holds the unseen rows out for all: there is one model
    return {**files, first: {**files[first], "held_out": rows_file(folder / "held-out.jsonl", held_out)}}


@dataclass(frozen=True)
class Setting:
    """One way to learn from all rows."""

    every: int
    """Steps between two averages; 0: one model on all rows."""
    lora: str = "frozen-a"
    updates: str = "changes"
    schedule: str = "linear"

    @property
    def name(self) -> str:
        if self.updates == "gradients":
            return f"gradients averaged, {self.lora}"
        if self.every:
            return f"averaged every {self.every} steps, {self.lora}"
        return POOLED if self.schedule == "linear" else f"{POOLED}, constant rate"

    @property
    def silos(self) -> int:
        return len(SILOS) if self.every else 1

    def run(self, draw: int, order: int, rate: float, *, report: bool) -> Trial:
        every, batch = self.every or STEPS, BATCH if self.every else BATCH * len(SILOS)
        train = {"rounds": STEPS // every, "steps": every, "batch": batch}
        train |= {"learning_rate": rate, "schedule": self.schedule}
        changes: Values = {"train": train, "federation": {"lora": self.lora, "updates": self.updates}}
        corpus: Corpus = replace(
            OPINING,
            files=partial(files_of, draw, report),
            sections=merged(
                OPINING.sections,
                {
                    "task": {
                        "prompt": "{text}\nSentiment (positive, neutral or negative):",
                        "choices": [f" {name}" for name in CLASSES],
                    },
                    "model": {"bottom": 2, "top": 2},
                },
            ),
        )
        return tried(corpus, changes, silos=self.silos, seed=10 * draw + order)


SETTINGS = {
    "pooled": Setting(0, "plain"),
    "constant": Setting(0, "plain", schedule="constant"),
    "gradients": Setting(1, "plain", "gradients"),
    "every": Setting(1),
    "every-plain": Setting(1, "plain"),
    "other": Setting(2),
    "eighth": Setting(8),
}


def main() -> None:
    results = Results("averaging", "make bench-averaging")
    accuracies: dict[str, list[float]] = {}
    for key in sys.argv[1:] or SETTINGS:
        accuracies[key] = measure(results, SETTINGS[key])
    for key, found in accuracies.items():
        if key != "pooled" and "pooled" in accuracies:
            gap(results, SETTINGS[key], found, accuracies["pooled"])
    print(f"written: {results.write(keep=len(sys.argv) > 1)}")


def measure(results: Results, setting: Setting) -> list[float]:
    """Accuracy on unseen rows of each run, in per cent."""
    chosen = {rate: setting.run(*RUNS[0], rate, report=False).final.loss for rate in RATES}
    best = min(chosen, key=chosen.__getitem__)
    results.add(f"{setting.name}: learning rate chosen on validation rows", best, "")
    trials = [setting.run(*one, best, report=True) for one in RUNS]
    found = [100 * trial.final.accuracy for trial in trials]
    note(results, f"{setting.name}: accuracy on unseen rows", found, "%")
    note(results, f"{setting.name}: loss of unseen rows", [trial.final.loss for trial in trials], "nats")
    spent = [sum(one.summed for one in trial.times) for trial in trials]
    note(results, f"{setting.name}: processor time of all parties", spent, "s")
    return found


def gap(results: Results, setting: Setting, found: list[float], pooled: list[float]) -> None:
    """How far below the pooled model, run by run on the same unseen rows, with the standard error over runs."""
    below = [one - other for one, other in zip(pooled, found, strict=True)]
    error = statistics.stdev(below) / len(below) ** 0.5
    results.add(f"{setting.name}: standard error of the distance from pooled, over runs", error, "points")
    judged = setting in (SETTINGS["gradients"], SETTINGS["every"])
    goal = round(max(BELOW, error), 4) if judged else None
    results.add(f"{setting.name}: below pooled", statistics.fmean(below), "points", at_most=goal)


if __name__ == "__main__":
    main()
