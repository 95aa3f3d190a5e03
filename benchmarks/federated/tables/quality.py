"""The first table: what a federation learns of public tasks, beside other ways to learn from the same rows.

All arms take the same number of steps. The pooled model reads in each step the rows that the silos read together, a
silo alone those that it reads in the federation. Pooled and alone train the uncut model. Each has the learning rate
that costs least on validation rows with the first seed; federations take the pooled model's, which favours that one.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path

import torch

from benchmarks.common.results import SPREAD, Results, note
from benchmarks.common.rows import Rows, Values
from benchmarks.federated.corpora import rows_file
from benchmarks.federated.simulation import federate, merged, recipe_of
from benchmarks.federated.tables.cells import Cell, digest, recipe_digest
from benchmarks.federated.tables.sets import LONG, SILOS, SOURCES, TASKS, Sample
from benchmarks.federated.tables.uncut import Question, Tensors, UncutModel
from isthmus.data.tokens import Tokens, batches
from isthmus.recipe import Recipe
from isthmus.tasks.metrics import measure

BATCH = 2
"""Rows a step, of each silo."""
RATES = (2e-4, 5e-4, 1e-3, 2e-3)
LORA: Values = {"rank": 8, "alpha": 16.0, "targets": ["q_proj", "v_proj"]}
MAX_TOKENS = 512
FEDERATED: Values = {
    "train": {"steps": 1},
    "federation": {"secure": {"masks": True}, "lora": "plain"},
}
"""Keys of the federated arms: under masks a round of one step sends gradients, so that both factors may train. All
other keys are as a recipe has them unless told otherwise."""
PUBLISHED: Values = {"boundary": {"forward": {"noise": 0.025}}}
"""Noise of mean magnitude 0.02 on hidden states, as FedSEA-LLaMA publishes, in training and in use."""
FEDERATIONS: dict[str, Values] = {"federated": {}, "noised": PUBLISHED}
RATE_OF = {"pooled": "pooled", "alone": "alone", "federated": "pooled", "noised": "pooled"}
"""By which arm's trials an arm's learning rate is chosen."""
ARMS = ("zero-shot", "pooled", "alone", "federated", "noised")
NATS = "nats"
"""The key of what the right answers cost: of choices one of them, of what is written a token."""
NORMAL = 1.96
"""Standard errors to each side of a 95 % interval."""
MOST_BELOW = 1.0
"""Points that the federation may be below the pooled model, or one standard error if that is more."""


@dataclass(frozen=True)
class Setting:
    """What the tables are made with."""

    model: Path
    device: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Together:
    """What silos learned in a federation."""

    tensors: Tensors
    """Adapters of bottom, trunk and top, by uncut name."""
    losses: list[float]
    """Mean over silos of each step's loss."""


class Learning:
    """One task with one seed: its rows, and the arms that learn from them.

    Args:
        folder: for its files.
    """

    def __init__(self, setting: Setting, task: str, seed: int, folder: Path) -> None:
        self.setting, self.task, self.seed, self._folder = setting, task, seed, folder
        self.source = SOURCES[task]
        self.sample: Sample = self.source.sample(seed)
        self.steps = self.source.steps
        self._kept: dict[tuple[tuple[str, ...], float], Tensors] = {}

    def recipe(self, changes: Values, own: Mapping[str, Values] = {}) -> Recipe:
        """With these sections' keys, and keys of single silos."""
        silos = {
            name: {"train": self._file(name, rows), **own.get(name, {})} for name, rows in self.sample.train.items()
        }
        values: Values = {
            "seed": self.seed,
            "task": self.source.section,
            "lora": LORA,
            "train": {"rounds": self.steps, "batch": BATCH, "max_tokens": MAX_TOKENS},
        }
        return recipe_of(self.setting.model, silos, merged(values, changes), self.setting.device)

    @cached_property
    def uncut(self) -> UncutModel:
        return UncutModel(self.recipe({}), self.setting.device)

    @cached_property
    def reported(self) -> list[Question]:
        return self.uncut.rows(self._file("reported", self.sample.reported))

    @cached_property
    def validation(self) -> list[Question]:
        return self.uncut.rows(self._file("validation", self.sample.validation))

    def learned(self, silos: Sequence[str], rate: float) -> Tensors:
        """What the uncut model learns from the rows of these silos; kept, since trials of rates learn the same."""
        key = (tuple(silos), rate)
        if key not in self._kept:
            rows = {name: self.uncut.rows(self._file(name, self.sample.train[name])) for name in silos}
            self._kept[key] = self.uncut.train(self._joined(rows), self.steps, rate)
        return self._kept[key]

    def federated(self, changes: Values, rate: float, own: Mapping[str, Values] = {}) -> Together:
        """What the silos learn together."""
        recipe = self.recipe(merged(merged(FEDERATED, {"train": {"learning_rate": rate}}), changes), own)
        with tempfile.TemporaryDirectory() as temporary:
            learned = federate(recipe, Path(temporary))
            return Together(learned.tensors(recipe.train.rounds), learned.losses())

    def answered(self, tensors: Tensors) -> Values:
        """What the model with these adapters makes of the rows that are reported."""
        self.uncut.load(tensors)
        given = self.uncut.answers(self.reported)
        pairs = [(one.item, said) for one, said in zip(self.reported, given, strict=True)]
        names = self.uncut.task.metrics if self.uncut.task else ("accuracy", "macro_f1")
        scores = {name: score.value for name, score in measure(names, pairs).items()}
        rows = [measure([row_measure(names)], [pair])[row_measure(names)].value for pair in pairs]
        return {"rows": rows, **scores, NATS: self.uncut.surprise(self.reported)}

    def costs(self, tensors: Tensors) -> float:
        """Of the validation rows, in nats."""
        self.uncut.load(tensors)
        return self.uncut.surprise(self.validation)

    def _joined(self, rows: Mapping[str, Sequence[Question]]) -> Iterator[list[Tokens]]:
        """In each step the rows that these silos read in a federation's."""
        drawn = [batches([one.tokens for one in own], BATCH, f"{self.seed}/{name}") for name, own in rows.items()]
        for _ in count():
            yield [row for one in drawn for row in next(one)]

    def _file(self, name: str, rows: Rows) -> Path:
        return rows_file(self._folder / f"{name}.jsonl", rows)


def row_measure(names: Sequence[str]) -> str:
    """The measure of one row, by which arms are compared row by row."""
    first = names[0]
    return "accuracy" if first in ("accuracy", "f1a") else "rougeL" if first.startswith("rouge") else first


class Arms:
    """The cells of one task with one seed.

    Args:
        first: those of the first seed, with which learning rates are chosen; None: these.
    """

    def __init__(self, learning: Learning, first: Arms | None = None) -> None:
        self.learning, self._first = learning, first or self

    def cell(self, arm: str) -> Cell:
        """As it is determined with the learning rates that were chosen so far."""
        # without training every seed finds the same
        name = arm if arm == "zero-shot" else f"{arm}-{self.learning.seed}"
        return Cell(f"quality/{self.learning.task}/{name}", self._determined(arm))

    def measured(self, arm: str) -> Values:
        """The cell's result, now if it was not measured before."""
        learning = self.learning
        if arm in RATE_OF:
            self._first._choose(RATE_OF[arm])
        ways: dict[str, Callable[[], Values]] = {
            "zero-shot": lambda: learning.answered({}),
            "pooled": lambda: learning.answered(learning.learned(SILOS, self.rate(arm))),
            "alone": lambda: self._alone(self.rate(arm)),
            "federated": lambda: learning.answered(learning.federated({}, self.rate(arm)).tensors),
            "noised": lambda: self._noised(self.rate(arm)),
        }
        return self.cell(arm).measured(ways[arm])

    def rate(self, arm: str) -> float:
        """The learning rate that costs least on the validation rows, with the first seed; NaN if none was chosen."""
        costs = self._first._costs(RATE_OF[arm]).found() if arm in RATE_OF else None
        return float(min(costs, key=costs.__getitem__)) if costs else math.nan

    def _choose(self, arm: str) -> None:
        self._costs(arm).measured(partial(self._tried, arm))

    def _costs(self, arm: str) -> Cell:
        about = {**self._about(), "rates": RATES, "validation": digest(self.learning.sample.validation)}
        return Cell(f"quality/{self.learning.task}/rate-{arm}", about)

    def _tried(self, arm: str) -> Values:
        """Of silos alone the first one is tried."""
        silos = SILOS if arm == "pooled" else SILOS[:1]
        return {str(rate): self.learning.costs(self.learning.learned(silos, rate)) for rate in RATES}

    def _alone(self, rate: float) -> Values:
        """The mean of what each silo's model answers."""
        each = [self.learning.answered(self.learning.learned([name], rate)) for name in SILOS]
        means = {key: statistics.fmean(one[key] for one in each) for key in each[0] if key != "rows"}
        return {"rows": [statistics.fmean(row) for row in zip(*(one["rows"] for one in each), strict=True)], **means}

    def _noised(self, rate: float) -> Values:
        learning = self.learning
        together = learning.federated(PUBLISHED, rate)
        noise, bottom = PUBLISHED["boundary"]["forward"]["noise"], learning.uncut.recipe.model.bottom
        with learning.uncut.noised(noise, bottom, learning.seed):
            return learning.answered(together.tensors)

    def _about(self) -> Values:
        learning = self.learning
        return {
            "model": learning.setting.model.name,
            "task": learning.source.section,
            "train": digest(learning.sample.train),
            "steps": learning.steps,
            "batch": BATCH,
            "lora": LORA,
            "max_tokens": MAX_TOKENS,
            "seed": learning.seed,
        }

    def _determined(self, arm: str) -> Values:
        about = {**self._about(), "arm": arm, "reported": digest(self.learning.sample.reported)}
        if arm == "zero-shot":
            return {key: about[key] for key in ("model", "task", "max_tokens", "arm", "reported")}
        if arm in FEDERATIONS:
            recipe = self.learning.recipe(merged(FEDERATED, FEDERATIONS[arm]))
            about["recipe"] = recipe_digest(recipe)
        return {**about, "rate": self.rate(arm)}


def run(setting: Setting, tasks: Sequence[str], arms: Sequence[str]) -> None:
    """Measure the cells that are missing, all arms of a seed before the next seed."""
    for task in tasks:
        with arms_of(setting, task) as by_seed:
            for one in by_seed.values():
                for arm in arms:
                    one.measured(arm)


def report(results: Results, setting: Setting, tasks: Sequence[str]) -> None:
    """What the cells that there are say."""
    for task in tasks:
        with arms_of(setting, task) as by_seed:
            found = {arm: {seed: one.cell(arm).found() for seed, one in by_seed.items()} for arm in ARMS}
        for arm in ARMS:
            cells = [one for one in found[arm].values() if one]
            report_arm(results, task, arm, cells[:1] if arm not in RATE_OF else cells)
        for arm in FEDERATIONS:
            report_gap(results, f"{task}, {arm} above pooled", paired(found[arm], found["pooled"]))
        gain_SR = paired(found["federated"], found["alone"])
        report_gap(results, f"{task}, federated above alone", gain_SR, judged=False)
    report_gains(results)


def report_arm(results: Results, task: str, arm: str, cells: Sequence[Values]) -> None:
    if not cells:
        print(f"{task}, {arm}: not measured")
        return
    own = row_measure(tuple(key for key in cells[0] if key != "rows"))
    note(results, f"{task}, {arm}: {own}", [100 * statistics.fmean(one["rows"]) for one in cells], "%")
    for key in cells[0]:
        if key not in ("rows", own, NATS):
            note(results, f"{task}, {arm}: {key}", [100 * one[key] for one in cells], "%")
    if all(NATS in one for one in cells):
        note(results, f"{task}, {arm}: {NATS}", [one[NATS] for one in cells], NATS)


def report_gap(results: Results, name: str, apart_SR: torch.Tensor, *, judged: bool = True) -> None:
    """How far apart two arms are; judged by the goal of a federation beside the pooled model, or not."""
    if not len(apart_SR):
        print(f"{name}: not measured")
        return
    low, high, error = interval(apart_SR)
    goal = -round(max(MOST_BELOW, error), 4) if judged else None
    results.add(name, float(apart_SR.mean()), f"points, {len(apart_SR)} seeds", at_least=goal)
    results.add(f"{name}, lower end of the 95 % interval", low, "points")
    results.add(f"{name}, upper end of the 95 % interval", high, "points")


def report_gains(results: Results) -> None:
    """What joining gains over training alone, over the tasks of which both are known: in points, and, where it is known
    of all of these, in nats; with the tasks' steps and with three times as many.
    """
    known = results.known()
    for tasks, more in ((TASKS, ""), (LONG, ", long")):
        points, saved = ([gain(known, task, measured) for task in tasks] for measured in (main_measure, nats_saved))
        report_gain(results, f"mean over tasks{more}, federated above alone", "points", points)
        if all(nats is not None for one, nats in zip(points, saved, strict=True) if one is not None):
            report_gain(results, f"mean over tasks{more}, federated costs less than alone", NATS, saved)


def report_gain(results: Results, name: str, unit: str, gains: Sequence[float | None]) -> None:
    """The mean of what is known of K tasks, and its interval, which is to be above 0."""
    measured = [one for one in gains if one is not None]
    if len(measured) < 2:
        return
    low, high, _ = interval(torch.tensor(measured)[None])
    results.add(name, statistics.fmean(measured), f"{unit}, {len(measured)} tasks")
    results.add(f"{name}, lower end of the 95 % interval", low, unit, at_least=0.0)
    results.add(f"{name}, upper end of the 95 % interval", high, unit)


Known = Mapping[str, float | None]


def gain(known: Known, task: str, measured: Callable[[Known, str, str], float | None]) -> float | None:
    """By how much the federation is above silos alone; None: not measured."""
    ours, theirs = (measured(known, task, arm) for arm in ("federated", "alone"))
    return None if ours is None or theirs is None else ours - theirs


def main_measure(known: Known, task: str, arm: str) -> float | None:
    """The mean of the measure by which rows are compared, which is the first of an arm; None: not measured."""
    start = f"{task}, {arm}: "
    own = (one for one in known.items() if one[0].startswith(start) and one[0] != f"{start}{NATS}")
    return next((value for name, value in own if not SPREAD.search(name)), None)


def nats_saved(known: Known, task: str, arm: str) -> float | None:
    """What right answers cost, so that more is better; None: not measured."""
    cost = known.get(f"{task}, {arm}: {NATS}")
    return None if cost is None else -cost


def paired(one: Mapping[int, Values | None], other: Mapping[int, Values | None]) -> torch.Tensor:
    """Points by which one arm is above another, of each seed that both have and each row, S × R."""
    pairs = [(mine["rows"], theirs["rows"]) for seed in one if (mine := one[seed]) and (theirs := other[seed])]
    return torch.tensor([[100 * (a - b) for a, b in zip(*pair, strict=True)] for pair in pairs])


def interval(apart_SR: torch.Tensor) -> tuple[float, float, float]:
    """The 95 % interval and the standard error of the mean: what other rows and other seeds would change is added."""
    spread = [one.var() / len(one) for one in (apart_SR.mean(dim=0), apart_SR.mean(dim=1)) if len(one) > 1]
    mean, error = float(apart_SR.mean()), math.sqrt(float(sum(spread)))
    return mean - NORMAL * error, mean + NORMAL * error, error


@contextmanager
def arms_of(setting: Setting, task: str) -> Iterator[dict[int, Arms]]:
    """The cells of a task, by seed."""
    with tempfile.TemporaryDirectory() as temporary:
        found: dict[int, Arms] = {}
        for seed in setting.seeds:
            learning = Learning(setting, task, seed, Path(temporary) / str(seed))
            found[seed] = Arms(learning, next(iter(found.values()), None))
        yield found
