"""The third table: rounds that other local optimizers need to the loss of plain ones, on two sets of unlike silos.

Ten Shakespearean speakers, and ten silos with CLINC150's requests in mixtures of their own (Dirichlet, 0.5), of
stories260k. Each optimizer is compared with the plain one in which nothing else differs: SCAFFOLD with local SGD,
FedNova with silos that take unequal steps, too. The plain one's learning rate, chosen on validation rows, is the
other's as well, but for a buffer, which needs a lower one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common.results import Results
from benchmarks.common.rows import Values
from benchmarks.federated.corpora import ROUTING, SPEAKING, Corpus, with_validation
from benchmarks.federated.evaluation import Evaluator, Score, pooled
from benchmarks.federated.simulation import federate, merged
from benchmarks.federated.tables.cells import Cell, digest, recipe_digest
from benchmarks.federated.trials import Trial
from isthmus.recipe import Recipe

CORPORA: dict[str, Corpus] = {"speakers": SPEAKING, "topics": ROUTING}
SILOS, ROUNDS, STEPS, EVERY = 10, 12, 5, 2
UNEQUAL = (1, 2, 3, 4, 5, 5, 6, 7, 8, 9)
"""Steps of each silo in a round, where they differ."""


@dataclass(frozen=True)
class Optimizer:
    """How silos and root step."""

    changes: Values
    against: str
    """The plain one that it is compared with."""
    rates: tuple[float, ...] = ()
    """To choose from; none: the rate is the plain one's."""
    unequal: bool = False


ADAM, SGD = (5e-3, 1e-2, 2e-2), (0.03, 0.1, 0.3)
SINGLY = (1e-3, 2e-3, 4e-3)
"""Where nobody waits, the trunk takes a step for each silo's, and at the others' rates it diverges."""
PLAIN: Values = {"federation": {"lora": "plain"}}
LOCAL_SGD: Values = {"train": {"optimizer": "sgd"}, "federation": {"lora": "plain", "weights": "equal"}}
OPTIMIZERS = {
    "FedAvg": Optimizer(PLAIN, "FedAvg", ADAM),
    "FedProx": Optimizer(merged(PLAIN, {"train": {"proximal": 0.01}}), "FedAvg"),
    "sharpness-aware": Optimizer(merged(PLAIN, {"train": {"sharpness": 0.05}}), "FedAvg"),
    "buffered": Optimizer({"federation": {"lora": "plain", "asynchronous": {"buffer": 5}}}, "FedAvg", SINGLY),
    "FedAvg, unequal steps": Optimizer(PLAIN, "FedAvg, unequal steps", ADAM, unequal=True),
    "FedNova": Optimizer({"federation": {"lora": "plain", "normalized": True}}, "FedAvg, unequal steps", unequal=True),
    "FedAvg, SGD": Optimizer(LOCAL_SGD, "FedAvg, SGD", SGD),
    "SCAFFOLD": Optimizer(merged(LOCAL_SGD, {"federation": {"control": "scaffold"}}), "FedAvg, SGD"),
}


def run(seeds: Sequence[int]) -> None:
    """Measure the cells that are missing."""
    torch.set_num_threads(1)
    for corpus in CORPORA:
        for seed in seeds:
            for name, optimizer in OPTIMIZERS.items():
                tried = name if optimizer.rates else optimizer.against
                for rate in OPTIMIZERS[tried].rates:
                    measured(corpus, tried, seeds[0], rate, choosing=True)
                measured(corpus, name, seed, chosen(corpus, tried, seeds[0]))


def report(results: Results, seeds: Sequence[int]) -> None:
    """Rounds and processor time to the plain one's last loss, over the seeds that were measured."""
    for corpus in CORPORA:
        for name, optimizer in OPTIMIZERS.items():
            plain = chosen(corpus, optimizer.against, seeds[0])
            rate = chosen(corpus, name, seeds[0]) if optimizer.rates else plain
            pairs = [(found(corpus, name, seed, rate), found(corpus, optimizer.against, seed, plain)) for seed in seeds]
            known = [(own, plain) for own, plain in pairs if own and plain]
            if rate is None or not known:
                print(f"{corpus}, {name}: not measured")
                continue
            report_one(results, f"{corpus}, {name}", "" if name == optimizer.against else optimizer.against, known)


def report_one(results: Results, label: str, against: str, pairs: Sequence[tuple[Values, Values]]) -> None:
    """
    Args:
        against: the plain one; empty: it is that itself.
    """
    losses = [own["losses"][str(ROUNDS)] for own, _ in pairs]
    results.add(f"{label}: loss after {ROUNDS} rounds, {len(pairs)} seeds", sum(losses) / len(losses), "nats")
    if not against:
        return
    needed = [trial(own).rounds_to(plain["losses"][str(ROUNDS)]) for own, plain in pairs]
    mean = sum(needed) / len(needed)
    results.add(f"{label}: rounds to the loss of {against}, of {ROUNDS}", mean, "rounds")
    spent = [own["seconds"] / plain["seconds"] for own, plain in pairs]
    results.add(f"{label}: work of all parties, beside {against}", sum(spent) / len(spent), "ratio")


def trial(result: Values) -> Trial:
    """A result as a trial whose silos are one."""
    return Trial({int(round): {"all": Score(loss, 0.0, 1)} for round, loss in result["losses"].items()}, (), 0.0)


def chosen(corpus: str, name: str, seed: int) -> float | None:
    """The rate with which an optimizer ends lowest on validation rows; None if not all were tried."""
    tried = {rate: found(corpus, name, seed, rate, choosing=True) for rate in OPTIMIZERS[name].rates}
    ends = {rate: one["losses"][str(ROUNDS)] for rate, one in tried.items() if one}
    return min(ends, key=ends.__getitem__) if len(ends) == len(tried) else None


def found(corpus: str, name: str, seed: int, rate: float | None, *, choosing: bool = False) -> Values | None:
    """The result of a cell, if it was measured."""
    if rate is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return cell_of(recipe_for(corpus, name, seed, rate, Path(folder), choosing), corpus, name, choosing).found()


def measured(corpus: str, name: str, seed: int, rate: float | None, *, choosing: bool = False) -> None:
    assert rate is not None
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_for(corpus, name, seed, rate, Path(folder), choosing)
        cell_of(recipe, corpus, name, choosing).measured(lambda: learned(recipe, Path(folder)))


def recipe_for(corpus: str, name: str, seed: int, rate: float, folder: Path, choosing: bool) -> Recipe:
    optimizer = OPTIMIZERS[name]
    train = {"rounds": ROUNDS, "steps": STEPS, "learning_rate": rate}
    rows = with_validation(CORPORA[corpus])[0 if choosing else 1]
    recipe = rows.recipe(folder / "rows", merged({"train": train}, optimizer.changes), silos=SILOS, seed=seed)
    if not optimizer.unequal:
        return recipe
    values = recipe.model_dump(mode="json", exclude_none=True)
    for silo, steps in zip(values["silo"], UNEQUAL, strict=True):
        silo["steps"] = steps
    return Recipe.of(values)


def learned(recipe: Recipe, folder: Path) -> Values:
    """Loss of all held-out rows after rounds, and processor time of all parties."""
    evaluator = Evaluator(recipe)
    start = time.process_time()
    run = federate(recipe, folder)
    spent = time.process_time() - start
    rounds = sorted({*range(0, ROUNDS, EVERY), ROUNDS})
    scores = {round: pooled(evaluator.scores(run.tensors(round) if round else {}).values()) for round in rounds}
    return {"losses": {str(round): one.loss for round, one in scores.items()}, "seconds": spent}


def cell_of(recipe: Recipe, corpus: str, name: str, choosing: bool) -> Cell:
    files = [file for silo in recipe.silo for file in (*silo.train, *(silo.held_out or ()))]
    rows = [Path(file).read_text(encoding="utf-8") for file in files]
    kind = f"rate-{recipe.train.learning_rate:g}" if choosing else "reported"
    path = f"optimizers/{corpus}/{name.replace(', ', '-').replace(' ', '-')}-{kind}-{recipe.seed}"
    return Cell(path, {"rows": digest(rows), "recipe": recipe_digest(recipe)})
