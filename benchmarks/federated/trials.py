"""One federation run to its end and measured: scores after rounds, and the time of each round."""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common.rows import Values
from benchmarks.federated.corpora import Corpus
from benchmarks.federated.evaluation import Evaluator, Score, pooled
from benchmarks.federated.simulation import Craft, Times, federate
from isthmus.privacy.events import Release
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
LEARNED = ("lora", "train", "boundary", "trunk", "federation")
"""Sections of a shipped recipe that say how it learns, whatever the model and the data."""
Poison = Callable[[Recipe], None]
"""Changes malicious silos' files before anybody reads them."""
Probe = Callable[[Evaluator, Mapping[str, torch.Tensor]], float]
"""Measures what a federation learned in a way of its own."""


@dataclass(frozen=True)
class Trial:
    """Scores and times of a federation."""

    scores: Mapping[int, Mapping[str, Score]]
    """By round, of each silo's held-out rows."""
    times: tuple[Times, ...]
    update_bytes: float
    probed: float = 0.0
    """After the last round."""
    updates: tuple[Release, ...] = ()
    """Releases of the first silo's updates, from its ledger."""

    @property
    def last(self) -> Mapping[str, Score]:
        return self.scores[max(self.scores)]

    @property
    def final(self) -> Score:
        """Of all silos' rows, after the last round."""
        return pooled(self.last.values())

    def rounds_to(self, loss: float) -> float:
        """Until the loss of all rows is no more than this, between two measured rounds on the line; infinite if it
        never is."""
        before = 0.0, float("inf")
        for round in sorted(self.scores):
            reached = pooled(self.scores[round].values()).loss
            if reached <= loss:
                span = before[1] - reached
                share = (before[1] - loss) / span if before[1] < float("inf") and span else 1.0
                return before[0] + share * (round - before[0])
            before = float(round), reached
        return float("inf")

    def seconds(self, rounds: float, *, summed: bool = False) -> float:
        """Processor time of the first ``rounds`` rounds; a part of a round counts in proportion."""
        spent = [one.summed if summed else one.side_by_side for one in self.times]
        if rounds > len(spent):
            return float("inf")
        whole = int(rounds)
        return sum(spent[:whole]) + (rounds - whole) * (spent[whole] if whole < len(spent) else 0.0)


def tried(
    corpus: Corpus,
    changes: Values,
    *,
    silos: int,
    seed: int = 0,
    every: int | None = None,
    malicious: Collection[str] = (),
    craft: Craft | None = None,
    poison: Poison | None = None,
    probe: Probe | None = None,
    device: str = "cpu",
) -> Trial:
    """Run and measure one federation.

    Args:
        changes: of the corpus's recipe.
        every: measure before the first round and after every ``every``-th; left out, after the last.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = corpus.recipe(folder / "rows", changes, silos=silos, seed=seed, device=device)
        evaluator = Evaluator(recipe)
        if poison is not None:
            poison(recipe)
        learned = federate(recipe, folder, malicious=malicious, craft=craft)
        last = recipe.train.rounds
        rounds = sorted({*range(0, last, every), last}) if every else [last]
        scores = {round: evaluator.scores(learned.tensors(round) if round else {}) for round in rounds}
        probed = probe(evaluator, learned.tensors(last)) if probe else 0.0
        ledger = read_ledger(learned.run.role(recipe.silo[0].name).path / "ledger.jsonl")
        updates = tuple(one for one in ledger.releases() if one.path == "update")
        return Trial(scores, learned.times, learned.update_bytes, probed, updates)


def shipped(name: str) -> Values:
    """Sections of a shipped recipe that say how it learns."""
    values = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
    return {section: values[section] for section in LEARNED if section in values}
