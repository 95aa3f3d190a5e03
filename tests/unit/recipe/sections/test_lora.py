"""``[lora]``: the adapters."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import changed, least, refused


def test_defaults_and_what_is_asked_for() -> None:
    assert Recipe.of(least()).lora.targets == ("q_proj", "v_proj")
    lora = Recipe.of(changed(least(), {"lora.rank": 3, "lora.targets": ["o_proj"], "lora.freeze_bottom": True})).lora
    assert (lora.rank, lora.targets, lora.freeze_bottom) == (3, ("o_proj",), True)


@pytest.mark.parametrize(("key", "bad"), [("rank", 0), ("alpha", 0.0), ("targets", []), ("freeze_bottom", "yes")])
def test_what_is_no_adapter_is_refused(key: str, bad: Any) -> None:
    assert refused(changed(least(), {f"lora.{key}": bad})).message.startswith(f"lora.{key} = ")
