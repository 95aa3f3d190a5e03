"""``[boundary.defence]``: what bottom learns against reconstruction."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import changed, least, refused


def test_there_is_none_unless_told_and_then_every_term_is_measured() -> None:
    assert Recipe.of(least()).boundary.defence is None
    defence = Recipe.of(changed(least(), {"boundary.defence": {"inverter": 0.5}})).boundary.defence
    assert defence is not None
    assert defence.model_dump() == {"answer": 0.0, "inverter": 0.5, "capacity": 0.0, "correlation": 0.0}


@pytest.mark.parametrize("key", ["answer", "inverter", "capacity", "correlation"])
@pytest.mark.parametrize("bad", [-0.1, float("inf"), "much"])
def test_wrong_weights_are_refused(key: str, bad: Any) -> None:
    assert refused(changed(least(), {f"boundary.defence.{key}": bad})).message.startswith(f"boundary.defence.{key} = ")
