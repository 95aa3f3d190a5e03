"""``[model]``: the base model and its cut."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import changed, least, refused


def test_a_model_is_cut_behind_two_blocks_unless_told() -> None:
    model = Recipe.of(least()).model
    assert (model.bottom, model.top, model.dtype) == (2, 2, "float32")


@pytest.mark.parametrize(("key", "bad"), [("bottom", 0), ("top", 0), ("dtype", "int8"), ("path", 3)])
def test_what_is_no_cut_or_type_is_refused(key: str, bad: Any) -> None:
    assert refused(changed(least(), {f"model.{key}": bad})).message.startswith(f"model.{key} = ")
