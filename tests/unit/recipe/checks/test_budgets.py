"""Budgets need releases with a finite epsilon."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import OUT, Case, assert_mended, changed, least, name_of

BOUND = {"clip": 1.0, "noise": 1.0}
BOUNDED = {f"boundary.{path}": BOUND for path in ("forward", "gradient")}
DP = {"mechanism": "dp_gaussian", "clip": 1.0, "epsilon": 2.0, "delta": 1e-5}
METRIC = {"mechanism": "metric", "epsilon": 2.0}
CLASSES = {"detectors": ["email"], "classes": {"high": {"noise": 2.0, "epsilon": 4.0}}}
REFUSED: list[Case] = [
    (
        {"privacy.record_epsilon": 5.0},
        "privacy.record_epsilon: what leaves by boundary.forward has no clip or no noise",
        "give boundary.forward both",
        BOUNDED,
    ),
    (
        {"privacy.silo_epsilon": 5.0},
        "privacy.silo_epsilon: what leaves by boundary.forward",
        "leave the budget out",
        {"privacy.silo_epsilon": OUT},
    ),
    (
        BOUNDED | {"privacy.silo_epsilon": 5.0},
        "privacy.silo_epsilon: what leaves by boundary.update",
        "give boundary.update both",
        {"boundary.update": BOUND},
    ),
    (
        {"sensitivity": CLASSES, "boundary": {"forward": BOUND, "gradient": {"noise": 1.0}}},
        "sensitivity.classes.high.epsilon: what leaves by boundary.gradient",
        "give boundary.gradient both",
        {"boundary.gradient.clip": 1.0},
    ),
    (
        BOUNDED
        | {
            "privacy.silo_epsilon": 1.0,
            "federation": {"secure": True, "weights": "equal", "clip": {"norm": 1.0}},
            "federation.noise": {"multiplier": 1.0, "where": "root"},
        },
        "what leaves by boundary.update has no clip",
        "leave the budget out",
        {"privacy.silo_epsilon": OUT},
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_a_budget_that_nothing_could_keep_is_refused(case: Case) -> None:
    assert_mended(case)


@pytest.mark.parametrize("gradient", [METRIC | {"clip": 1.0}, {"clip": 1.0, "noise": 0.1}])
def test_budgets_where_everything_is_bounded(gradient: dict[str, Any]) -> None:
    privacy = {"record_epsilon": 5.0, "silo_epsilon": 9.0, "delta": 1e-6}
    boundary = {"forward": DP, "gradient": gradient, "update": {"clip": 1.0, "noise": 0.5}}
    recipe = Recipe.of(changed(least(), {"privacy": privacy, "boundary": boundary}))
    assert (recipe.privacy.record_epsilon, recipe.boundary.forward.epsilon) == (5.0, 2.0)


def test_a_gradient_that_does_not_leave_needs_no_bound() -> None:
    asked = {"sensitivity": CLASSES, "boundary": {"forward": BOUND, "gradients": False}}
    assert Recipe.of(changed(least(), asked))


def test_a_silos_budget_is_kept_by_noise_in_the_sum() -> None:
    federation = {"secure": True, "weights": "equal", "clip": {"norm": 1.0}, "noise": {"multiplier": 1.0}}
    asked = BOUNDED | {"privacy.silo_epsilon": 5.0, "federation": federation}
    assert Recipe.of(changed(least(), asked)).privacy.silo_epsilon == 5.0
