"""``[boundary.codec]``: one codec for all directions, or one each."""

from __future__ import annotations

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import changed, least


def test_one_codec_stands_for_all_four() -> None:
    codecs = Recipe.of(changed(least(), {"boundary.codec": "int8+zstd"})).boundary.codec
    assert set(codecs.model_dump().values()) == {"int8+zstd"}
    mixed = Recipe.of(changed(least(), {"boundary.codec.forward_up": "int4"})).boundary.codec
    assert (mixed.forward_up, mixed.gradient_down) == ("int4", "fp32")
