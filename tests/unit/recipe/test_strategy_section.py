"""The recipe's sections on weights, fairness and server optimizers: what they take and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import RecipeError
from isthmus.recipe import FairnessSection, FederationSection, OptimizerSection, Recipe, WeightsSection
from tests.conftest import make_recipe

CALIBRATED = {"update": {"mechanism": "dp_gaussian", "clip": 1.0, "epsilon": 2.0, "delta": 1e-5}}
NOISED = {"update": {"clip": 1.0, "noise": 0.1}}
CLIPPED = {"update": {"clip": 1.0, "noise": 0.0}}


def recipe(federation: dict[str, Any], *, held_out: bool = True, **sections: Any) -> Recipe:
    silos = [{"name": name, "train": "t.jsonl"} | ({"held_out": "h.jsonl"} if held_out else {}) for name in "abc"]
    return make_recipe(Path("model"), federation=federation, silo=silos, **sections)


def section(**federation: Any) -> FederationSection:
    return recipe(federation).federation


def test_by_default_nothing_is_weighed_scaled_or_stepped_otherwise() -> None:
    asked = FederationSection()
    assert asked.weights == WeightsSection(kind="examples", bound=2.0)
    assert asked.fairness == FairnessSection(kind="none", strength=1.0, reference=2.0, bound=4.0)
    assert asked.optimizer == OptimizerSection(kind="none")


def test_a_kind_alone_stands_for_its_section() -> None:
    asked = section(weights="equal", fairness="tilted", optimizer="yogi")
    assert asked == section(weights={"kind": "equal"}, fairness={"kind": "tilted"}, optimizer={"kind": "yogi"})
    assert (asked.weights.kind, asked.fairness.kind, asked.optimizer.kind) == ("equal", "tilted", "yogi")


def test_a_recipe_with_them_is_read_again_as_it_was(tmp_path: Path) -> None:
    optimizer = {"kind": "adam", "learning_rate": 0.01, "momentum": 0.5, "second_momentum": 0.9, "adaptivity": 1e-4}
    first = recipe(
        {"secure": True, "weights": "equal", "fairness": {"kind": "q-ffl", "bound": 8}, "optimizer": optimizer}
    )
    (tmp_path / "recipe.toml").write_text(first.toml())
    assert Recipe.read(tmp_path / "recipe.toml").federation == first.federation


@pytest.mark.parametrize(
    ("federation", "key"),
    [
        ({"optimizer": "sgd"}, "optimizer.kind"),
        ({"optimizer": 3}, "optimizer"),
        ({"optimizer": {"kind": "adam", "learning_rate": 0.0}}, "optimizer.learning_rate"),
        ({"optimizer": {"kind": "adam", "momentum": 1.0}}, "optimizer.momentum"),
        ({"optimizer": {"kind": "adam", "momentum": -0.1}}, "optimizer.momentum"),
        ({"optimizer": {"kind": "adam", "second_momentum": 1.0}}, "optimizer.second_momentum"),
        ({"optimizer": {"kind": "yogi", "adaptivity": 0.0}}, "optimizer.adaptivity"),
        ({"optimizer": {"kind": "yogi", "adaptivity": float("nan")}}, "optimizer.adaptivity"),
        ({"weights": "tokens"}, "weights.kind"),
        ({"weights": {"bound": 0.9}}, "weights.bound"),
        ({"weights": {"bound": float("inf")}}, "weights.bound"),
        ({"fairness": "minimax"}, "fairness.kind"),
        ({"fairness": {"strength": 0.0}}, "fairness.strength"),
        ({"fairness": {"reference": 0.0}}, "fairness.reference"),
        ({"fairness": {"bound": 0.5}}, "fairness.bound"),
    ],
)
def test_a_wrong_value_names_its_key(federation: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(federation)
    assert caught.value.message.startswith(f"federation.{key} = ")
    assert caught.value.remedy == f"correct the value of federation.{key}"


@pytest.mark.parametrize(
    ("federation", "sections", "told", "remedy"),
    [
        ({"optimizer": {"learning_rate": 0.5}}, {}, "the optimizer 'none' does not take it", "leave learning_rate out"),
        ({"optimizer": {"kind": "momentum", "adaptivity": 0.1}}, {}, "'momentum' does not", "leave adaptivity out"),
        ({"optimizer": {"kind": "adagrad", "momentum": 0.5}}, {}, "'adagrad' does not", "leave momentum out"),
        (
            {"weights": "agreement", "secure": True},
            {},
            "the root sees none",
            "federation.secure.masks = false",
        ),
        (
            {"weights": "inverse-variance", "secure": True},
            {},
            "the root sees none",
            "'examples' or 'equal'",
        ),
        ({"weights": "quality", "secure": True}, {}, "the root sees none", "'examples' or 'equal'"),
        (
            {"weights": "agreement", "fairness": "q-ffl"},
            {},
            "ignores the weight",
            "'examples' or 'equal'",
        ),
        (
            {"weights": "quality", "fairness": "agnostic"},
            {},
            "ignores the weight",
            "'examples' or 'equal'",
        ),
        ({"weights": "quality"}, {"held_out": False}, "measured on held_out rows", "give them to every silo"),
        ({"weights": "agreement"}, {"boundary": CALIBRATED}, "no longer bounds its influence", "'examples' or 'equal'"),
        ({"weights": "inverse-variance"}, {"boundary": CALIBRATED}, "no longer bounds its influence", "'examples'"),
        (
            {"weights": "quality"},
            {"boundary": NOISED},
            "epsilon of boundary.update would not",
            "federation.weights out",
        ),
        ({"fairness": "tilted"}, {"boundary": CALIBRATED}, "leaves without noise", "federation.fairness out"),
        (
            {"fairness": "q-ffl", "secure": True},
            {"boundary": NOISED},
            "leaves without noise",
            "fairness out, or the clip",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    federation: dict[str, Any], sections: dict[str, Any], told: str, remedy: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(federation, **sections)
    assert told in caught.value.message
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("federation", "boundary"),
    [
        ({"weights": "agreement"}, CLIPPED),
        ({"weights": "agreement"}, NOISED),
        ({"weights": "quality"}, CLIPPED),
        ({"weights": "equal", "optimizer": "yogi", "secure": True}, CALIBRATED),
        ({"weights": "equal", "fairness": "tilted", "secure": True}, CLIPPED),
        ({"fairness": "agnostic", "secure": True, "optimizer": "adam"}, {}),
    ],
)
def test_what_can_be_together_is_not_refused(federation: dict[str, Any], boundary: dict[str, Any]) -> None:
    assert recipe(federation, boundary=boundary)
