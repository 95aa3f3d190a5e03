"""What a plan says budgets allow is how often rows leave before the boundary refuses them."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.data.silo_data import SiloData
from isthmus.engines.privacy_plan import MOST_PASSES, PrivacyPlan, affordable_passes, plan_privacy
from isthmus.errors import BudgetExhausted
from isthmus.privacy.accountant import Account
from isthmus.privacy.budget import Budget
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary
from isthmus.silo.join import load_tokenizer, open_records
from tests.conftest import make_recipe, save_tiny_model, write_rows

CALIBRATED = {"mechanism": "dp_gaussian", "clip": 1.0, "epsilon": 8.0, "delta": 1e-5}
NOISED = {"mechanism": "gaussian", "clip": 1.0, "noise": 2.0}
METRIC = {"mechanism": "metric", "clip": 1.0, "epsilon": 8.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def recipe_of(model: Path, folder: Path, noise: dict[str, Any], limit: float | None, **more: Any) -> Recipe:
    rows = [{"prompt": " ".join(["w20"] * (number + 2)), "answer": " w7"} for number in range(3)]
    write_rows(folder / "rows.jsonl", rows)
    return make_recipe(
        model,
        silo=[{"name": "a", "train": str(folder / "rows.jsonl")}],
        boundary={"forward": noise, "gradient": noise, **more.pop("boundary", {})},
        privacy={"record_epsilon": limit} if limit is not None else {},
        **more,
    )


def left(recipe: Recipe, most: int) -> list[int]:
    """By row: how often it leaves, in both directions, until it is refused."""
    tokenizer = load_tokenizer(Path(recipe.model.path))
    records = open_records(recipe, tokenizer, None)
    data = SiloData(recipe.party("a"), recipe, tokenizer, records.sensitivity)
    records.add_rows(data.known_rows(), data.train, recipe.boundary.tail)
    boundary, counts = Boundary(recipe.boundary, budget=Budget(recipe.privacy), records=records), []
    forwards, gradients = recipe.step_releases
    for row in data.train:
        subjects, passes = records.subjects([row.input], [len(row.input)]), 0
        with suppress(BudgetExhausted):
            while passes < most:
                h_TD = torch.zeros(len(row.input), 16)
                for path, times in (("forward", forwards), ("gradient", gradients)):
                    for _ in range(times):
                        boundary.release(h_TD, path, passes, subjects)  # type: ignore[arg-type]
                passes += 1
        counts.append(passes)
    return counts


@pytest.mark.parametrize("noise", [CALIBRATED, NOISED, METRIC], ids=["calibrated", "gaussian", "metric"])
@pytest.mark.parametrize("limit", [0.01, 30.0, 150.0])
@pytest.mark.parametrize("sharpness", [0.0, 0.1])
def test_a_record_leaves_as_often_as_planned(
    noise: dict[str, Any], limit: float, sharpness: float, model: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(model, tmp_path, noise, limit, train={"sharpness": sharpness})
    plan = plan_privacy(recipe, "a")
    counts = left(recipe, 200)
    assert plan.groups[0].fewest == min(counts)
    assert plan.groups[0].median == sorted(counts)[1]
    assert plan.groups[0].most == max(counts)
    assert plan.spent == (max(counts) == 0)


def test_without_noise_or_limits_any_number_is_allowed(model: Path, tmp_path: Path) -> None:
    plan = plan_privacy(recipe_of(model, tmp_path, {"noise": 0.0}, None), "a")
    assert (plan.groups[0].epsilon, plan.groups[0].limit) == (math.inf, math.inf)
    assert plan.groups[0].fewest == MOST_PASSES
    assert not plan.spent
    assert plan.silo_passes is None


def test_a_silo_is_planned_as_a_whole(model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(model, tmp_path, NOISED, None)
    limited = recipe.model_copy(update={"privacy": recipe.privacy.model_copy(update={"silo_epsilon": 40.0})})
    found = plan_privacy(limited, "a")
    assert found.silo_passes is not None
    assert 0 < found.silo_passes < MOST_PASSES
    none = recipe.model_copy(update={"privacy": recipe.privacy.model_copy(update={"silo_epsilon": 0.01})})
    assert plan_privacy(none, "a").spent


def test_what_is_released_once_costs_its_hidden_states_once(model: Path, tmp_path: Path) -> None:
    more = {"lora": {"freeze_bottom": True}, "boundary": {"release_once": True}}
    often = plan_privacy(recipe_of(model, tmp_path, CALIBRATED, 150.0), "a")
    once = plan_privacy(recipe_of(model, tmp_path, CALIBRATED, 150.0, **more), "a")
    assert once.groups[0].fewest > often.groups[0].fewest


def test_planned_passes_are_steps_times_rows(model: Path, tmp_path: Path) -> None:
    def plan(**train: Any) -> PrivacyPlan:
        return plan_privacy(recipe_of(model, tmp_path, NOISED, None, train=train), "a")

    assert plan(rounds=3, steps=2, batch=2).passes == 4.0
    assert plan(rounds=2, epochs=2, batch=3).passes == 2.0


def test_counting_is_that_of_composing_pass_by_pass() -> None:
    first, later = Account(gaussian=0.5, pures=((0.2, 1),)), Account(gaussian=0.125, pures=((0.1, 2),))
    for limit in (0.0, 0.5, 1.0, 3.0, 10.0):  # each step of the slow count takes a third of a second
        slow, spent = 0, first
        while spent.within(limit, 1e-5):
            slow, spent = slow + 1, spent.joined(later)
        assert affordable_passes(first, later, limit, 1e-5) == slow
    assert affordable_passes(first, Account(), 40.0, 1e-5) == MOST_PASSES
