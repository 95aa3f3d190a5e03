"""By the private recipe a text cannot be averaged out of its noise: its crossings are bounded, as the recipe says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from isthmus.errors import BudgetExhausted
from isthmus.privacy.budget import Budget
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary

PRIVATE = Path(__file__).parents[2] / "recipes" / "private.toml"
CROSSINGS, BITS, EPSILON = 10, 20, 133.1


def test_a_text_crosses_as_often_as_the_recipe_says_and_no_more() -> None:
    recipe = Recipe.read(PRIVATE)
    boundary = Boundary(recipe.boundary, budget=Budget(recipe.privacy))
    states, text = torch.randn(1, 4), Subjects(("text",), (1,))
    for step in range(CROSSINGS):
        boundary.release(states, "forward", step, text)
    with pytest.raises(BudgetExhausted):
        boundary.release(states, "forward", CROSSINGS, text)
    assert boundary.budget.epsilon == pytest.approx(EPSILON, abs=0.05)
    boundary.release(states, "forward", CROSSINGS, Subjects(("another text",), (1,)))


def test_the_planned_run_fits_and_the_comment_states_the_totals() -> None:
    recipe, text = Recipe.read(PRIVATE), PRIVATE.read_text(encoding="utf-8")
    forward, width = recipe.boundary.forward, recipe.boundary.width
    assert width is not None
    bits = width / 2 * math.log2(1 + forward.clip**2 / (width * forward.noise**2))
    assert bits * CROSSINGS == pytest.approx(BITS)
    assert f"epsilon {EPSILON}" in text
    assert f"{BITS} bits" in text
    assert recipe.train.rounds + 1 <= CROSSINGS  # evaluations of a held-out text
    assert not recipe.boundary.gradients
