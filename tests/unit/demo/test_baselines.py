"""The demo's baselines: which rows they train on, and which they are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Batch
from isthmus.demo import baselines
from isthmus.demo.baselines import Baselines
from isthmus.recipe import Recipe
from isthmus.silo.join import load_tokenizer
from isthmus.silo.trainer import Step, evaluate
from tests.conftest import make_recipe, save_tiny_model, uncut, write_rows

CHOICES = ("w58", "w59")
WORDS = {"a": range(4, 14), "b": range(14, 24)}
"""Of each silo's training rows; nothing else has them."""
HELD_OUT = {"a": range(24, 34), "b": range(34, 44)}
ROUNDS, STEPS, BATCH = 2, 3, 2


@torch.no_grad()
def guess(model: torch.nn.Module, word: int) -> str:
    """The choice that the untrained model gives to a text of this word."""
    logits_V = model(input_ids=torch.tensor([[word]])).logits[0, -1]
    return max(CHOICES, key=lambda choice: float(logits_V[int(choice[1:])]))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Two silos. The untrained model is right on all held-out rows; training rows all have the same label."""
    model = save_tiny_model("llama", tmp_path / "model")
    whole = uncut(model)
    silos = []
    for name, words in WORDS.items():
        train = [{"text": f"w{word}", "label": CHOICES[0]} for word in words]
        held_out = [{"text": f"w{word}", "label": guess(whole, word)} for word in HELD_OUT[name]]
        assert {guess(whole, word) for word in words} == {row["label"] for row in held_out} == set(CHOICES)
        files = {"train": train, "held_out": held_out}
        paths = {key: str(write_rows(tmp_path / f"{name}-{key}.jsonl", rows)) for key, rows in files.items()}
        silos.append({"name": name, **paths})
    return make_recipe(
        model,
        task={"prompt": "{text}", "answer": "{label}", "choices": list(CHOICES)},
        train={"rounds": ROUNDS, "steps": STEPS, "batch": BATCH},
        silo=silos,
    )


@dataclass
class Seen:
    """The words of each batch that was trained on."""

    batches: list[list[int]]

    def step(self, model: object, optimizer: object, batch: Batch) -> Step:
        self.batches.append(sorted(batch.input_ids[batch.attention_mask.bool()].tolist()))
        return Step(0.0, 1, 1, 0.0)

    def of(self, name: str) -> list[int]:
        """How many rows of this silo were in each batch."""
        return [len(set(batch) & set(WORDS[name])) for batch in self.batches]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen([])
    monkeypatch.setattr(baselines, "train_step", found.step)
    return found


def test_alone_trains_each_silo_on_its_own_rows(recipe: Recipe, seen: Seen) -> None:
    Baselines(recipe, lambda line: None).alone()
    steps = ROUNDS * STEPS
    assert seen.of("a") == [BATCH] * steps + [0] * steps
    assert seen.of("b") == [0] * steps + [BATCH] * steps


def test_pooled_trains_on_all_silos_rows_at_once(recipe: Recipe, seen: Seen) -> None:
    Baselines(recipe, lambda line: None).pooled()
    assert seen.of("a") == seen.of("b") == [BATCH] * ROUNDS * STEPS
    assert all(len(batch) == BATCH * len(WORDS) for batch in seen.batches)


def test_baselines_are_measured_on_held_out_rows(recipe: Recipe, seen: Seen) -> None:
    """Nothing trains here, and the untrained model is right on held-out rows alone."""
    measured = Baselines(recipe, lambda line: None)
    assert measured.alone() == measured.pooled() == {"a": 1.0, "b": 1.0}


def test_majority_is_of_held_out_rows(recipe: Recipe) -> None:
    model = uncut(Path(recipe.model.path))
    shares = {}
    for name, words in HELD_OUT.items():
        first = sum(guess(model, word) == CHOICES[0] for word in words)
        shares[name] = max(first, len(words) - first) / len(words)
    assert all(share < 1 for share in shares.values())
    assert Baselines(recipe, lambda line: None).majority() == shares


def test_evaluate_measures_held_out_rows(recipe: Recipe) -> None:
    folder = Path(recipe.model.path)
    data = SiloData(recipe.silo[0], recipe, load_tokenizer(folder))
    assert evaluate(uncut(folder), data) == {"accuracy": 1.0}
    assert evaluate(uncut(folder), data, data.train)["accuracy"] < 1.0


def test_each_baseline_starts_untrained(recipe: Recipe) -> None:
    """A silo's own model has learned nothing of the silo before it."""
    measured = Baselines(recipe, lambda line: None)
    measured.pooled()
    first = measured.alone()
    assert measured.alone() == first
