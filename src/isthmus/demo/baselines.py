"""Baselines of the demo: the uncut model in one process, trained on one silo's rows or on all silos' rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Batch, Tokens, batches, collate
from isthmus.model import adapters
from isthmus.model.cut import Part
from isthmus.model.families import family_of
from isthmus.model.optim import build_optimizer, set_rate
from isthmus.recipe import Recipe
from isthmus.silo.join import load_tokenizer
from isthmus.silo.trainer import evaluate, train_step
from isthmus.tasks import metrics


class Baselines:
    """The uncut model with the recipe's adapters on every block, trained on the federation's batches and steps.

    Args:
        notify: called with messages of progress.
    """

    def __init__(self, recipe: Recipe, notify: Callable[[str], None]) -> None:
        transformers_logging.disable_progress_bar()
        folder = Path(recipe.model.path)
        tokenizer = load_tokenizer(folder)
        self._recipe = recipe
        self._notify = notify
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.requires_grad_(False)
        self._part = Part("trunk", self._model, family_of(self._model.config), 0)
        adapters.add_adapter(self._part, recipe.lora, recipe.seed, freeze_a=False)
        self._untrained = adapters.adapter_of(self._part)
        self._silos = [SiloData(silo, recipe, tokenizer) for silo in recipe.silo]

    def majority(self) -> dict[str, float]:
        """Held-out accuracy, 0 to 1, of always giving the silo's most common answer, by silo."""
        return {silo.name: metrics.majority([tuple(row.answer) for row in silo.held_out]) for silo in self._silos}

    def alone(self) -> dict[str, float]:
        """Held-out accuracy, 0 to 1, by silo, of a model trained on its rows alone, for as many steps."""
        scores = {}
        for silo in self._silos:
            self._train([silo], f"{silo.name} alone")
            scores[silo.name] = self._score(silo)
        return scores

    def pooled(self) -> dict[str, float]:
        """Held-out accuracy, 0 to 1, by silo, of one model trained on all silos' rows, for as many steps."""
        self._train(self._silos, "all rows in one place")
        return {silo.name: self._score(silo) for silo in self._silos}

    def _train(self, silos: list[SiloData], name: str) -> None:
        adapters.load_adapter(self._part, self._untrained)
        train = self._recipe.train
        optimizer = build_optimizer(adapters.trainable(self._part).values(), train)
        for number, batch in enumerate(self._batches(silos), 1):
            set_rate(optimizer, train.rate(number, train.rounds * train.steps))
            step = train_step(self._model, optimizer, batch)
            if number % train.steps == 0:
                self._notify(f"{name}: step {number}/{train.rounds * train.steps}, loss {step.loss:.3f}")

    def _batches(self, silos: list[SiloData]) -> Iterator[Batch]:
        """The silos' batches of each step, joined into one batch."""
        train, seed = self._recipe.train, self._recipe.seed
        drawn = [batches(silo.train, train.batch, f"{seed}/{silo.name}") for silo in silos]
        for rows in itertools.islice(zip(*drawn, strict=True), train.rounds * train.steps):
            together: list[Tokens] = [row for silo_rows in rows for row in silo_rows]
            yield collate(together, silos[0].pad)

    def _score(self, silo: SiloData) -> float:
        return evaluate(self._model, silo)["accuracy"]
