"""``[root]``: the aggregator at the top."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import changed, least, refused


def test_it_shares_the_trunks_address_and_waits_for_all_unless_told() -> None:
    recipe = Recipe.of(least())
    assert recipe.root.address == recipe.trunk.address
    assert recipe.root.minimum is None
    assert recipe.tree.node("root").minimum == 3
    assert Recipe.of(changed(least(), {"root.minimum": 2})).tree.node("root").minimum == 2


@pytest.mark.parametrize(("key", "bad"), [("patience", 0.0), ("minimum", 0), ("address", 7001)])
def test_wrong_values_are_refused(key: str, bad: Any) -> None:
    assert refused(changed(least(), {f"root.{key}": bad})).message.startswith(f"root.{key} = ")
