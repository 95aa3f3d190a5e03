"""``[[edge]]``: aggregators between silos and root."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import changed, least, refused

EDGE = {"name": "ward", "address": "localhost:7101", "silos": ["a", "b", "c"]}


def test_an_edge_waits_for_its_whole_cohort_a_quarter_as_long() -> None:
    recipe = Recipe.of(changed(least(), {"edge": [EDGE], "root.patience": 100.0}))
    node = recipe.tree.node("ward")
    assert (node.children, node.minimum, node.patience) == (("a", "b", "c"), 3, 25.0)


@pytest.mark.parametrize(("key", "bad"), [("name", "Ward"), ("minimum", 0), ("patience", 0.0), ("silos", "a")])
def test_wrong_values_are_refused(key: str, bad: Any) -> None:
    assert refused(changed(least(), {"edge": [{**EDGE, key: bad}]})).message.startswith(f"edge.0.{key} = ")
