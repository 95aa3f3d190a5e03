"""The recipe's section on sensitivity: what it takes, and what it refuses with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import RecipeError
from isthmus.recipe import Recipe, SensitivitySection
from tests.conftest import make_recipe

BOUNDED = {"forward": {"clip": 1.0, "noise": 1.0}, "gradient": {"clip": 1.0, "noise": 1.0}}
GOOD = {
    "detectors": ["email", "name"],
    "names": "names.txt",
    "function": "mine.py:look",
    "fields": {"prompt": "low"},
    "attention": 2.0,
    "classes": {"high": {"noise": 2.0, "epsilon": 4.0}, "low": {"noise": 0.5}},
}


def section(**changes: Any) -> SensitivitySection:
    recipe = make_recipe(Path("model"), sensitivity=GOOD | changes, boundary=BOUNDED)
    assert recipe.sensitivity is not None
    return recipe.sensitivity


def test_listed_detectors_share_a_class() -> None:
    assert section().detectors == {"email": "high", "name": "high"}
    assert section(detected="low").detectors == {"email": "low", "name": "low"}
    assert section(detectors={"email": "low", "name": "normal"}).detectors == {"email": "low", "name": "normal"}


def test_a_recipe_with_it_is_read_again_as_it_was(tmp_path: Path) -> None:
    recipe = make_recipe(Path("model"), sensitivity=GOOD, boundary=BOUNDED)
    (tmp_path / "recipe.toml").write_text(recipe.toml())
    again = Recipe.read(tmp_path / "recipe.toml")
    assert again.sensitivity is not None
    assert again.sensitivity.classes == section().classes
    assert again.sensitivity.names == str(tmp_path / "names.txt")
    assert again.sensitivity.function == f"{tmp_path}/mine.py:look"


def test_a_functions_module_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        make_recipe(Path("m"), sensitivity=GOOD | {"function": "a.b:c"}, boundary=BOUNDED).toml()
    )
    again = Recipe.read(tmp_path / "recipe.toml").sensitivity
    assert again is not None
    assert again.function == "a.b:c"


@pytest.mark.parametrize(
    ("changes", "near"),
    [
        ({"detectors": ["emial", "name"]}, "email"),
        ({"detectors": {"name": "hihg"}}, "high"),
        ({"detected": "hgih"}, "high"),
        ({"fields": {"prompt": "lwo"}}, "low"),
        ({"fields": {"promt": "low"}}, "answer, prompt"),
        ({"function": "look"}, "module:name"),
        ({"function": ":look"}, "module:name"),
        ({"detectors": ["email"]}, "detectors"),
        ({"classes": {"high": {"niose": 1.0}, "low": {}}}, "noise"),
        ({"clases": {}}, "classes"),
        ({"region": "usa"}, "region"),
    ],
)
def test_what_is_unknown_is_refused_with_the_nearest_known_one(changes: dict[str, Any], near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        section(**changes)
    assert near in caught.value.remedy


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": -1.0},
        {"attention": float("nan")},
        {"classes": {"high": {"noise": 0.0}, "low": {}}},
        {"classes": {"high": {"noise": -2.0}, "low": {}}},
        {"classes": {"high": {"epsilon": 0.0}, "low": {}}},
        {"classes": {"high": {"epsilon": -1.0}, "low": {}}},
        {"classes": {"high": 3, "low": {}}},
        {"detectors": "email"},
        {"detectors": [3]},
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="sensitivity"):
        section(**changes)
