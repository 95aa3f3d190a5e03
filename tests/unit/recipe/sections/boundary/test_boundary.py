"""``[boundary]``: what leaves a silo."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import changed, least, refused


def test_all_crosses_at_full_width_with_a_little_noise_unless_told() -> None:
    boundary = Recipe.of(least()).boundary
    assert (boundary.tail, boundary.width, boundary.residual, boundary.gradients) == (None, None, False, True)
    assert [getattr(boundary, path).noise for path in ("forward", "gradient", "update")] == [0.025, 1e-5, 1e-4]


def test_one_codec_is_for_all_four_directions() -> None:
    codec = Recipe.of(changed(least(), {"boundary.codec": "int8"})).boundary.codec
    assert set(codec.model_dump().values()) == {"int8"}


@pytest.mark.parametrize(("key", "bad"), [("tail", 0), ("width", 0), ("residual", 1), ("release_once", "yes")])
def test_wrong_values_are_refused(key: str, bad: Any) -> None:
    assert refused(changed(least(), {f"boundary.{key}": bad})).message.startswith(f"boundary.{key} = ")
