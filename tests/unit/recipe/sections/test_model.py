"""``[model]``: the base model and its cut."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from isthmus.errors import RecipeError
from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import changed, least, refused


def test_a_model_is_cut_behind_two_blocks_unless_told() -> None:
    model = Recipe.of(least()).model
    assert (model.bottom, model.top, model.dtype) == (2, 2, "float32")


@pytest.mark.parametrize(("key", "bad"), [("bottom", 0), ("top", 0), ("dtype", "int8"), ("path", 3)])
def test_what_is_no_cut_or_type_is_refused(key: str, bad: Any) -> None:
    assert refused(changed(least(), {f"model.{key}": bad})).message.startswith(f"model.{key} = ")


@pytest.mark.parametrize(("key", "bad"), [("cut", "2,2"), ("cut", True), ("leakage", 1.5), ("leakage", -0.1)])
def test_what_is_no_choice_of_a_cut_is_refused(key: str, bad: Any) -> None:
    assert refused(changed(least(), {f"model.{key}": bad})).message.startswith(f"model.{key} = ")


def test_a_measured_cut_replaces_auto() -> None:
    recipe = Recipe.of(changed(least(), {"model.cut": "auto", "model.leakage": 0.5}))
    with pytest.raises(RecipeError, match="measurement, which has not been made") as unmeasured:
        recipe.require_cut("here.toml")
    assert "isthmus cut --write here.toml" in unmeasured.value.remedy
    decided = recipe.with_cut(5, 1)
    decided.require_cut()
    assert (decided.model.cut, decided.model.bottom, decided.model.top) == ("stated", 5, 1)
    assert Recipe.of(tomllib.loads(decided.toml())) == decided
