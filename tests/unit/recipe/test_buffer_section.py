"""The recipe's keys on rounds that wait for nobody: what they take, and what does not go together with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import RecipeError
from isthmus.recipe import FederationSection, Recipe
from isthmus.recipe.tree import ROOT
from tests.conftest import make_recipe


def recipe(buffer: Any = 2, *, silos: str = "abcd", staleness: int = 10, **sections: Any) -> Recipe:
    federation = {"asynchronous": {"buffer": buffer, "staleness": staleness}, **sections.pop("federation", {})}
    return make_recipe(Path("model"), silos=tuple(silos), federation=federation, **sections)


def test_by_default_a_round_is_of_all_silos() -> None:
    assert (FederationSection().asynchronous.buffer, FederationSection().asynchronous.staleness) == (None, 10)
    assert make_recipe(Path("model"), silos=tuple("abc")).tree.node(ROOT).minimum == 3


def test_a_recipe_with_a_buffer_is_read_again_as_it_was(tmp_path: Path) -> None:
    first = recipe(3, staleness=0)
    (tmp_path / "recipe.toml").write_text(first.toml())
    assert Recipe.read(tmp_path / "recipe.toml").federation == first.federation


def test_as_many_silos_are_needed_as_fill_the_buffer() -> None:
    assert (recipe(2).tree.node(ROOT).minimum, recipe(2).tree.fewest()) == (2, 2)
    assert recipe(3, root={"minimum": 1}).tree.fewest() == 1


@pytest.mark.parametrize(
    "sections",
    [
        {"lora": "plain"},
        {"compression": "top-k"},
        {"compression": {"bits": 8}},
        {"weights": "equal"},
        {"fairness": "tilted"},
        {"optimizer": "adam"},
    ],
    ids=str,
)
def test_what_goes_together(sections: dict[str, Any]) -> None:
    assert recipe(4, federation=sections).federation.asynchronous.buffer == 4


EDGES = [{"name": "ward", "address": "localhost:1", "silos": ["a", "b"]}]
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"buffer": 5}, "one of each silo at most, and there are 4 silos", "lower it"),
    ({"root": {"minimum": 3}}, "made of 2 updates and never has 3", "raise federation.asynchronous.buffer"),
    ({"federation": {"secure": True}}, "masks cancel within one cohort", "federation.secure.masks"),
    ({"edge": EDGES}, "an edge passes on the sum of a round", "[[edge]]"),
    (
        {"federation": {"control": "scaffold", "weights": "equal"}, "train": {"optimizer": "sgd"}},
        "controls are the mean of all silos'",
        "federation.control = 'scaffold'",
    ),
    ({"federation": {"lora": "alternating"}}, "factors an update changes", "federation.lora = 'alternating'"),
    ({"federation": {"lora": "svd"}}, "factors an update changes", "federation.lora = 'svd'"),
    ({"federation": {"compression": "random-k"}}, "numbers take turns", "federation.compression = 'random-k'"),
    ({"federation": {"compression": "sketch"}}, "numbers take turns", "federation.compression = 'sketch'"),
    ({"federation": {"robust": "median"}}, "they may be most", "federation.robust.rule = 'median'"),
    ({"federation": {"robust": {"rule": "trimmed-mean", "mix": True}}}, "they may be most", "federation.robust.mix"),
    ({"trunk": {"adapter": "replica"}}, "replicas are averaged when all silos are there", "trunk.adapter"),
    ({"federation": {"weights": "agreement"}}, "'agreement' compares updates of one round", "'examples'"),
    ({"federation": {"weights": "inverse-variance"}}, "compares updates of one round", "'examples'"),
]


@pytest.mark.parametrize(("sections", "reason", "remedy"), REFUSED, ids=str)
def test_what_does_not(sections: dict[str, Any], reason: str, remedy: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(**sections)
    assert reason in caught.value.message
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("key", "value"), [("buffer", 0), ("buffer", -1), ("buffer", 1.5), ("staleness", -1), ("staleness", 0.5)]
)
def test_wrong_values(key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"federation.asynchronous.{key}"):
        make_recipe(Path("model"), silos=("a", "b"), federation={"asynchronous": {key: value}})
