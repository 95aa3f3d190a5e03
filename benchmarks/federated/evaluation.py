"""The uncut model with a federation's adapters, measured on held-out rows. It computes what the split model computes.

Shapes: B rows, V vocabulary, C choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import IGNORED, Tokens, collate
from isthmus.model import adapters
from isthmus.model.cut import Part
from isthmus.model.families import family_of
from isthmus.recipe import Recipe
from isthmus.silo.join import load_tokenizer

SIZE = 32
"""Rows a batch."""


@dataclass(frozen=True)
class Score:
    """Of held-out rows."""

    loss: float
    """Nats a supervised token."""
    accuracy: float
    """Share of those tokens that are the likeliest; where answers are choices, the likeliest choice."""
    count: int
    """Of those tokens."""


def pooled(scores: Iterable[Score]) -> Score:
    """Of the rows of all these."""
    listed = list(scores)
    count = sum(one.count for one in listed)
    loss, accuracy = (sum(getattr(one, key) * one.count for one in listed) / count for key in ("loss", "accuracy"))
    return Score(loss, accuracy, count)


class Evaluator:
    """Measures adapters of one recipe's shape.

    Args:
        recipe: its model, adapter, task and silos count.
    """

    def __init__(self, recipe: Recipe) -> None:
        folder = Path(recipe.model.path)
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._part = Part("trunk", self._model.requires_grad_(False), family_of(self._model.config), 0)
        adapters.add_adapter(self._part, recipe.lora, recipe.seed, freeze_a=False)
        self._model.requires_grad_(False).eval()
        self.recipe, self._tokenizer = recipe, load_tokenizer(folder)
        self.silos = {silo.name: self.rows(*silo.held_out) for silo in recipe.silo if silo.held_out}
        self._blank = adapters.adapter_of(self._part)

    def rows(self, *files: str | Path) -> list[Tokens]:
        """The rows of these files as the recipe's silos read them."""
        section = self.recipe.silo[0].model_copy(update={"train": tuple(map(str, files)), "held_out": None})
        data = SiloData(section, self.recipe, self._tokenizer)
        self._pad, self._choices_C = data.pad, torch.tensor([choice[-1] for choice in data.choices])
        return data.train

    def scores(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Score]:
        """Of each silo's held-out rows."""
        self._load(tensors)
        return {name: self._score(rows) for name, rows in self.silos.items()}

    def target(self, answer: str) -> int:
        """A choice as a token."""
        token: int = self._tokenizer(answer, add_special_tokens=False)["input_ids"][-1]
        return token

    @torch.no_grad()
    def answers(self, tensors: Mapping[str, torch.Tensor], rows: Sequence[Tokens]) -> list[int]:
        """The choice, as a token, that each of these rows gets."""
        self._load(tensors)
        found: list[int] = []
        for start in range(0, len(rows), SIZE):
            batch = collate(list(rows[start : start + SIZE]), self._pad)
            logits_BV = self._model(**batch.unsupervised(), use_cache=False).logits[:, -1]
            found += self._guess(logits_BV).tolist()
        return found

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        unknown = tensors.keys() - self._blank.keys()
        assert not unknown, unknown
        adapters.load_adapter(self._part, {**self._blank, **tensors})

    @torch.no_grad()
    def _score(self, rows: Sequence[Tokens]) -> Score:
        ordered = sorted(rows, key=lambda row: len(row.input))
        loss, right, count = 0.0, 0, 0
        for start in range(0, len(ordered), SIZE):
            batch = collate(ordered[start : start + SIZE], self._pad)
            output = self._model(**batch.inputs(), use_cache=False)
            told = batch.targets != IGNORED
            logits_KV = output.logits[told]
            right += int((self._guess(logits_KV) == batch.targets[told]).sum())
            loss += float(output.loss) * batch.weight
            count += batch.supervised
        return Score(loss / count, right / count, count)

    def _guess(self, logits_KV: torch.Tensor) -> torch.Tensor:
        if not len(self._choices_C):
            return logits_KV.argmax(1)
        return self._choices_C[logits_KV[:, self._choices_C].argmax(1)]
