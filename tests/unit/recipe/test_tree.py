"""The tree of aggregation."""

from __future__ import annotations

import pytest

from isthmus.errors import RecipeError
from isthmus.recipe import Recipe
from isthmus.recipe.tree import listed
from tests.unit.recipe.refusals import least

LEAST = least()


def test_the_tree_of_a_recipe() -> None:
    edges = [
        {"name": "low", "address": "l:1", "silos": ["a", "b", "c"], "parent": "high", "minimum": 2},
        {"name": "high", "address": "h:1", "silos": ["d"], "patience": 8.0},
        {"name": "near", "address": "n:1", "silos": ["e"], "sibling": "low"},
    ]
    silos = [{"name": name, "train": f"{name}.jsonl"} for name in "abcdef"]
    tree = Recipe.of(LEAST | {"edge": edges, "silo": silos, "root": {"minimum": 2}}).tree
    assert [tree.parent(name) for name in (*"adf", "low", "high")] == ["low", "high", "root", "high", "root"]
    assert tree.node("root").children == ("high", "near", "f")
    assert tree.node("high").children == ("low", "d")
    assert (tree.node("low").wards, tree.node("low").patience, tree.sibling("near")) == (("e",), 2.0, "low")
    assert [tree.leaf(name) for name in ("low", "high", "root")] == [True, False, False]
    assert [tree.fewest(name) for name in ("low", "high", "root")] == [2, 3, 2]
    assert (tree.silos, tree.edges) == (tuple("abcdef"), ("low", "high", "near"))
    assert tree.smallest() == 1


def test_an_edge_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match="no edge 'east'") as caught:
        Recipe.of(LEAST).tree.node("east")
    assert caught.value.remedy == "use one of: none"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "nobody"), (2, "silo-00, silo-01"), (12, ", ".join(f"silo-{n:02}" for n in range(10)) + " and 2 more")],
)
def test_parties_are_listed_for_a_log(count: int, text: str) -> None:
    assert listed({f"silo-{number:02}" for number in range(count)}) == text


def test_each_party_has_a_role_and_nobody_else_has() -> None:
    edges = [{"name": "left", "address": "localhost:1", "silos": ["a", "b"]}]
    tree = Recipe.of(LEAST | {"edge": edges}).tree
    found = {name: tree.role(name) for name in ("trunk", "root", *tree.parties)}
    assert found == {"trunk": "trunk", "root": "root", "left": "edge", "a": "silo", "b": "silo", "c": "silo"}
    for name in ("", "d", "Trunk", "authority"):
        with pytest.raises(RecipeError, match="no party") as caught:
            tree.role(name)
        assert all(known in caught.value.remedy for known in found)
