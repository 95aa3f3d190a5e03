"""Baselines: which rows they train on, which they are measured on, and that they are what a federation tends to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Batch
from isthmus.engines import baselines
from isthmus.engines.baselines import UncutModel, baseline_run, baseline_scores, train_baseline, trained_baseline
from isthmus.engines.evaluation import compare, evaluate_run
from isthmus.engines.export import export_adapter, final_adapter
from isthmus.engines.local import create_run
from isthmus.errors import NotSupportedError, RecipeError, RunError
from isthmus.model.adapters import write_adapter
from isthmus.recipe import Recipe
from isthmus.silo.join import load_tokenizer
from isthmus.silo.trainer import Step, evaluate
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from tests.conftest import make_recipe, save_tiny_model, uncut, write_rows
from tests.integration.processes import rows_of, train_here, write_federation

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
        train={"rounds": ROUNDS, "steps": STEPS, "batch": BATCH, "evaluate": "end"},
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


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> RunDirectory:
    return baseline_run(recipe, tmp_path / "run")


def test_alone_trains_each_silo_on_its_own_rows(run: RunDirectory, seen: Seen) -> None:
    train_baseline(run, "alone")
    steps = ROUNDS * STEPS
    assert seen.of("a") == [BATCH] * steps + [0] * steps
    assert seen.of("b") == [0] * steps + [BATCH] * steps


def test_pooled_trains_on_all_silos_rows_at_once(run: RunDirectory, seen: Seen) -> None:
    train_baseline(run, "pooled")
    assert seen.of("a") == seen.of("b") == [BATCH] * ROUNDS * STEPS
    assert all(len(batch) == BATCH * len(WORDS) for batch in seen.batches)


def test_silos_take_their_own_numbers_of_steps(recipe: Recipe, seen: Seen, tmp_path: Path) -> None:
    own = [recipe.silo[0].model_copy(update={"steps": 1}), recipe.silo[1]]
    train_baseline(baseline_run(recipe.model_copy(update={"silo": tuple(own)}), tmp_path / "run"), "pooled")
    assert seen.of("a") == [BATCH, 0, 0] * ROUNDS
    assert seen.of("b") == [BATCH] * ROUNDS * STEPS


def test_baselines_are_measured_on_held_out_rows(run: RunDirectory, seen: Seen) -> None:
    """Nothing trains here, and the untrained model is right on held-out rows alone."""
    assert baseline_scores(run, "alone") == {}
    for kind in baselines.BASELINES:
        train_baseline(run, kind)
        assert baseline_scores(run, kind) == {"a": {"accuracy": 1.0}, "b": {"accuracy": 1.0}}
    lines = read_journal(run.path / "baselines" / "alone" / "b" / "metrics.jsonl")
    assert [line["round"] for line in lines if line["event"] == "evaluation"] == [ROUNDS]


def test_evaluate_measures_held_out_rows(recipe: Recipe) -> None:
    folder = Path(recipe.model.path)
    data = SiloData(recipe.silo[0], recipe, load_tokenizer(folder))
    assert evaluate(uncut(folder), data) == {"accuracy": 1.0}
    assert evaluate(uncut(folder), data, data.train)["accuracy"] < 1.0


def same(one: dict[str, torch.Tensor] | None, other: dict[str, torch.Tensor] | None) -> bool:
    assert one is not None
    assert other is not None
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_baseline_goes_on_where_it_stopped(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is what it is without a stop, and without the silo before it."""
    whole, broken = (baseline_run(recipe, tmp_path / name) for name in ("whole", "broken"))
    train_baseline(whole, "alone")
    step, left = baselines.train_step, iter(range(ROUNDS * STEPS + 2))

    def failing(*arguments: Any) -> Step:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(baselines, "train_step", failing)
    with pytest.raises(KeyboardInterrupt):
        train_baseline(broken, "alone")
    assert trained_baseline(broken, "alone", "b") is None
    monkeypatch.setattr(baselines, "train_step", step)
    train_baseline(broken, "alone")
    for silo in ("a", "b"):
        assert same(trained_baseline(whole, "alone", silo), trained_baseline(broken, "alone", silo))
    before = (broken.path / "baselines" / "alone" / "a" / "metrics.jsonl").read_bytes()
    train_baseline(broken, "alone")
    assert (broken.path / "baselines" / "alone" / "a" / "metrics.jsonl").read_bytes() == before, "it is there already"


def test_an_unfinished_baseline_is_not_compared(run: RunDirectory, recipe: Recipe) -> None:
    train_baseline(run, "pooled")
    (run.path / "baselines" / "pooled" / "rounds" / f"round-{ROUNDS:04}.pt").unlink()
    with pytest.raises(RunError, match=f"has {ROUNDS - 1} of {ROUNDS} rounds") as unfinished:
        list(evaluate_run(run))
    assert "--baseline pooled" in unfinished.value.remedy
    train_baseline(run, "pooled")
    assert len(list(evaluate_run(run))) == len(recipe.silo)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("train.learning_rate", {"train": {"learning_rate": 0.5}}),
        ("lora.rank", {"lora": {"rank": 3}}),
        ("seed", {"seed": 9}),
        ("silo.a.train", {"silo": [{"train": ["other.jsonl"]}, {}]}),
    ],
)
def test_a_baseline_of_another_recipe_is_refused(
    key: str, changes: dict[str, Any], recipe: Recipe, run: RunDirectory
) -> None:
    """Before it is trained, and where the run's recipe was replaced afterwards."""
    train_baseline(run, "pooled")
    values = recipe.model_dump(mode="json", exclude_none=True)
    for table, value in changes.items():
        old = values[table]
        if isinstance(value, list):
            values[table] = [{**one, **new} for one, new in zip(old, value, strict=True)]
        else:
            values[table] = {**old, **value} if isinstance(value, dict) else value
    other = Recipe.of(values)
    with pytest.raises(RunError, match=f"{key} differs"):
        baseline_run(other, run.path)
    RunDirectory.create(run.path, other)
    with pytest.raises(RunError, match=f"trained by another recipe: .*{key} differs"):
        trained_baseline(run, "pooled", "a")
    RunDirectory.create(run.path, recipe)
    assert trained_baseline(run, "pooled", "a") is not None


def test_what_does_not_change_a_baseline_may_differ(recipe: Recipe, run: RunDirectory) -> None:
    """Noise, the way of averaging, the cut, and when it is measured; not so where bottom is frozen."""
    train = recipe.train.model_copy(update={"evaluate": False, "keep_rounds": 3})
    federation = recipe.federation.model_copy(update={"lora": "alternating"})
    model = recipe.model.model_copy(update={"bottom": 2, "top": 2})
    changed = recipe.model_copy(update={"train": train, "federation": federation, "model": model})
    assert baseline_run(changed, run.path).path == run.path
    frozen = changed.model_copy(update={"lora": recipe.lora.model_copy(update={"freeze_bottom": True})})
    with pytest.raises(RunError, match=r"model\.bottom"):
        baseline_run(frozen, run.path)


def test_training_that_diverges_is_named(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "train_step", lambda *_: Step(float("nan"), 1, 1, 0.0))
    with pytest.raises(RunError, match="a alone: training diverged in round 1"):
        train_baseline(run, "alone")


def test_a_model_of_images_and_text_is_refused(tmp_path: Path) -> None:
    recipe = make_recipe(save_tiny_model("gemma3", tmp_path / "model"))
    with pytest.raises(NotSupportedError, match="images and text"):
        UncutModel(recipe, "cpu")


def test_a_frozen_bottom_stays_frozen_and_a_start_is_taken(recipe: Recipe, tmp_path: Path, run: RunDirectory) -> None:
    model = UncutModel(
        recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"freeze_bottom": True})}), "cpu"
    )
    assert not any(".layers.0." in name for name in model.trained())
    assert any(".layers.1." in name for name in model.trained())
    train_baseline(run, "pooled")
    trained = trained_baseline(run, "pooled", "a")
    assert trained is not None
    write_adapter(tmp_path / "start", trained, recipe.lora, recipe.model.path)
    lora = recipe.lora.model_copy(update={"start": str(tmp_path / "start")})
    assert same(trained, UncutModel(recipe.model_copy(update={"lora": lora}), "cpu").tensors())


SGD = {"rounds": 3, "steps": 1, "optimizer": "sgd", "learning_rate": 0.5, "evaluate": False}


@pytest.mark.parametrize("kind", ["pooled", "alone"])
def test_a_baseline_is_what_a_federation_without_noise_equals(kind: baselines.BaselineKind, tmp_path: Path) -> None:
    """Averaged after every step of plain SGD it is the pooled model; of one silo it is the silo alone, under AdamW."""
    one = {"train": {**SGD, "optimizer": "adamw", "learning_rate": 1e-2, "steps": 2}}
    one |= {"silo": [{"name": "north", "train": "north.jsonl"}]}
    sections: dict[str, Any] = {"train": SGD} if kind == "pooled" else one
    written = write_federation(tmp_path, federation={"lora": "plain"}, **sections)
    run = create_run(Recipe.read(written), tmp_path / "run")
    train_here(run)
    train_baseline(run, kind)
    found, expected = trained_baseline(run, kind, "north"), final_adapter(run)[1]
    assert found is not None
    assert found.keys() == expected.keys()
    start = UncutModel(run.recipe(), "cpu").tensors()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=2e-6 if kind == "pooled" else 2e-5), name
    assert sum(not torch.equal(tensor, start[name]) for name, tensor in found.items()) == len(found)


@pytest.mark.usefixtures("trunk_here")
def test_a_run_and_its_baselines_are_compared_row_by_row(tmp_path: Path) -> None:
    labels = sorted({str(row["label"]) for name in ("north", "south") for row in rows_of(name)})
    silos = [{"name": name, "train": f"{name}.jsonl", "held_out": "north.jsonl"} for name in ("north", "south")]
    train = {"rounds": 1, "steps": 2, "evaluate": False}
    written = write_federation(tmp_path, train=train, task={"choices": labels}, silo=silos)
    run = baseline_run(Recipe.read(written), tmp_path / "run")
    train_baseline(run, "alone")
    first = list(evaluate_run(run))
    assert [(one.silo, one.model) for one in first] == [("north", "alone"), ("south", "alone")]
    assert compare(run.recipe(), first) == []
    train_here(run)
    train_baseline(baseline_run(Recipe.read(written), run.path), "pooled")
    found = list(evaluate_run(run))
    models = ("federated", "alone", "pooled")
    assert [(one.silo, one.model) for one in found] == [(silo, one) for silo in ("north", "south") for one in models]
    assert [one.scores for one in found if one.model == "alone"] == [one.scores for one in first]
    compared = compare(run.recipe(), found)
    assert [(one.silo, one.baseline, one.rows) for one in compared] == [
        *(("north", "alone", 12), ("south", "alone", 12), ("", "alone", 24)),
        *(("north", "pooled", 12), ("south", "pooled", 12), ("", "pooled", 24)),
    ]
    by = {(one.silo, one.model): one for one in found}
    for one in compared[:2]:
        ours, theirs = by[one.silo, "federated"], by[one.silo, one.baseline]
        right = [[row.given == row.right for row in model.predictions] for model in (ours, theirs)]
        apart = torch.tensor(right, dtype=torch.float64)[0] - torch.tensor(right, dtype=torch.float64)[1]
        assert one.differences["accuracy"].value == pytest.approx(float(apart.mean()))
        assert one.differences["accuracy"].error == pytest.approx(float(apart.std() / 12**0.5))
    export_adapter(run, tmp_path / "adapter")  # the federation's own files are as they were


def test_where_nothing_trains_there_is_no_baseline(recipe: Recipe, tmp_path: Path) -> None:
    still = recipe.model_copy(update={"train": recipe.train.model_copy(update={"rounds": 0})})
    with pytest.raises(RecipeError, match="nothing trains"):
        train_baseline(baseline_run(still, tmp_path / "run"), "pooled")
