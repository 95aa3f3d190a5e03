"""What a recipe may ask of silos' own steps, what it refuses, and how far so many steps go."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import RecipeError
from isthmus.recipe import Recipe, TrainSection
from tests.conftest import make_recipe

SGD = {"optimizer": "sgd"}
SCAFFOLD = {"control": "scaffold", "weights": "equal"}
BOUNDED = {"clip": 1.0, "noise": 0.1}
EDGES = [{"name": "e", "address": "localhost:1", "silos": ["a", "b", "c"]}]


def recipe(*, steps: tuple[int | None, ...] = (None, None, None), **sections: Any) -> Recipe:
    silos = [
        {"name": name, "train": "t.jsonl"} | ({"steps": own} if own else {})
        for name, own in zip("abc", steps, strict=True)
    ]
    return make_recipe(Path("model"), silo=silos, **sections)


def test_by_default_steps_are_the_optimizers_alone() -> None:
    train, federation = TrainSection(), recipe().federation
    assert (train.momentum, train.proximal, train.sharpness) == (0.0, 0.0, 0.0)
    assert (federation.normalized, federation.control) == (False, "none")
    assert recipe().silo[0].steps is None


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *[("train", "proximal", value) for value in (-1e-9, -1.0, math.nan, math.inf, "0.1", True)],
        *[("train", "sharpness", value) for value in (-0.05, math.nan, -math.inf, "much", False)],
        *[("train", "momentum", value) for value in (-0.1, 1.0, 1.5, math.nan)],
        *[("federation", "control", value) for value in ("Scaffold", "mime", True, 1)],
        *[("federation", "normalized", value) for value in ("yes", 1, "fednova")],
    ],
)
def test_a_wrong_value_names_its_key(section: str, key: str, value: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(**{section: {key: value}})
    assert caught.value.message.startswith(f"{section}.{key} = ")
    assert caught.value.remedy == f"correct the value of {section}.{key}"


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "3"])
def test_a_wrong_number_of_steps_names_its_silo(steps: Any) -> None:
    with pytest.raises(RecipeError, match=r"silo\.1\.steps = "):
        make_recipe(Path("m"), silo=[{"name": "a", "train": "t"}, {"name": "b", "train": "t", "steps": steps}])


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"train": {"momentum": 0.9}}, "train.momentum: 'adamw' has its own averages", "set train.optimizer = 'sgd'"),
    (
        {"train": {**SGD, "learning_rate": 0.1, "proximal": 10.0}},
        "train.proximal: with a learning rate of 0.1",
        "less than 10",
    ),
    (
        {"train": {"sharpness": 0.1}, "boundary": {"defence": {"answer": 1.0}}},
        "train.sharpness: a defence learns at every pass",
        "leave boundary.defence out",
    ),
    (
        {"train": {"sharpness": 0.1}, "trunk": {"adapter": "replica"}, "lora": {"freeze_bottom": True}},
        "goes through the replicas' mean",
        "set trunk.adapter = 'shared'",
    ),
    (
        {"steps": (2, None, None), "trunk": {"adapter": "replica"}},
        "silo.steps: replicas are averaged at the same steps",
        "set trunk.adapter = 'shared'",
    ),
    (
        {"federation": {"normalized": True, "lora": "svd"}},
        "federation.normalized: products of factors",
        "set federation.lora = 'alternating'",
    ),
]
REFUSED_CONTROL: list[tuple[dict[str, Any], str, str]] = [
    ({"train": {}}, "'adamw' goes another way", "set train.optimizer = 'sgd'"),
    ({"train": {**SGD, "momentum": 0.9}}, "momentum goes on from earlier rounds", "leave train.momentum out"),
    ({"train": {**SGD, "proximal": 0.1}}, "the proximal pull for a gradient", "leave train.proximal out"),
    ({"federation": {"weights": "examples"}}, "where all count alike", "set federation.weights = 'equal'"),
    ({"federation": {"weights": "agreement"}}, "where all count alike", "set federation.weights = 'equal'"),
    ({"federation": {"fairness": "tilted"}}, "where all count alike", "leave fairness out"),
    ({"federation": {"robust": "median"}}, "reject its control", "set federation.robust.rule = 'mean'"),
    ({"federation": {"robust": {"mix": True}}}, "reject its control", "mix = false"),
    ({"federation": {"compression": "random-k"}}, "count as a gradient of zero", "leave federation.compression"),
    ({"federation": {"compression": "top-k"}}, "count as a gradient of zero", "leave federation.compression"),
    ({"federation": {"compression": {"bits": 8}}}, "count as a gradient of zero", "leave federation.compression out"),
    ({"edge": EDGES, "federation": {"secure": True}}, "an edge does not know", "leave [[edge]] out"),
    ({"steps": (2, None, None)}, "silos with other numbers of steps", "set federation.normalized = true"),
    (
        {"privacy": {"record_epsilon": 9.0}, "boundary": {"forward": BOUNDED, "gradient": BOUNDED}},
        "rows that a budget skips",
        "set federation.normalized = true",
    ),
]


@pytest.mark.parametrize(("sections", "told", "remedy"), REFUSED)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], told: str, remedy: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(**sections)
    assert told in caught.value.message
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(("sections", "told", "remedy"), REFUSED_CONTROL)
def test_what_no_control_can_be_beside_is_refused(sections: dict[str, Any], told: str, remedy: str) -> None:
    asked = {"train": SGD, **sections, "federation": {**SCAFFOLD, **sections.get("federation", {})}}
    with pytest.raises(RecipeError) as caught:
        recipe(**asked)
    assert caught.value.message.startswith("federation.control: ")
    assert told in caught.value.message
    assert remedy in caught.value.remedy
    assert caught.value.remedy.endswith(", or control = 'none'")
    if "weights" not in sections.get("federation", {}) and "fairness" not in sections.get("federation", {}):
        asked["federation"] = {**asked["federation"], "control": "none"}
        assert recipe(**asked).federation.control == "none"


def test_a_controls_factors_must_last() -> None:
    with pytest.raises(RecipeError, match="federation"):
        recipe(train=SGD, federation={**SCAFFOLD, "lora": "svd"})


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {**SGD, "sharpness": 0.1}, "federation": {**SCAFFOLD, "secure": True, "optimizer": "momentum"}},
        {"train": SGD, "steps": (2, 5, None), "federation": {**SCAFFOLD, "normalized": True, "lora": "alternating"}},
        {"train": SGD, "federation": SCAFFOLD, "boundary": {"update": BOUNDED}},
        {"train": {"proximal": 0.1, "sharpness": 0.1}, "federation": {"robust": "median", "compression": "top-k"}},
        {"train": {"proximal": 1e9}},  # AdamW's steps are of one size
        {"steps": (1, 2, 3), "federation": {"normalized": True, "secure": True, "compression": "sketch"}},
        {"train": {"sharpness": 0.1}, "trunk": {"adapter": "replica"}},
        {"train": {"sharpness": 0.1}, "lora": {"freeze_bottom": True}, "boundary": {"release_once": True}},
    ],
)
def test_what_goes_together_is_read_again_as_it_was(sections: dict[str, Any], tmp_path: Path) -> None:
    first = recipe(**sections)
    (tmp_path / "recipe.toml").write_text(first.toml())
    again = Recipe.read(tmp_path / "recipe.toml")
    assert (again.train, again.federation) == (first.train, first.federation)
    assert [silo.steps for silo in again.silo] == [silo.steps for silo in first.silo]


def test_a_silo_has_its_own_steps_or_the_recipes() -> None:
    asked = recipe(steps=(2, None, 30), train={"steps": 7})
    assert [asked.steps(name) for name in ("a", "b", "c", "unheard-of")] == [2, 7, 30, 7]
    assert asked.mean_reach == 13.0


@given(st.integers(1, 60), st.floats(1e-4, 0.5), st.floats(1e-3, 0.99))
def test_steps_reach_as_far_as_fednova_says(steps: int, rate: float, shrinks: float) -> None:
    """Under a pull, so far from its start as a silo goes by a gradient of one; else one a step."""
    pulled = TrainSection(optimizer="sgd", learning_rate=rate, proximal=shrinks / rate)
    w = 0.0
    for _ in range(steps):
        w -= rate * (1.0 + pulled.proximal * w)
    assert pulled.reach(steps) == pytest.approx(-w / rate, rel=1e-6)
    for other in (TrainSection(proximal=5.0), TrainSection(optimizer="sgd", momentum=0.9, proximal=5.0)):
        assert other.reach(steps) == steps
    assert TrainSection(optimizer="sgd").reach(steps) == steps
