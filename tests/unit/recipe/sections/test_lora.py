"""``[lora]``: the adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import assert_mended, changed, least, refused


def test_defaults_and_what_is_asked_for() -> None:
    assert Recipe.of(least()).lora.targets == ("q_proj", "v_proj")
    lora = Recipe.of(changed(least(), {"lora.rank": 3, "lora.targets": ["o_proj"], "lora.freeze_bottom": True})).lora
    assert (lora.rank, lora.targets, lora.freeze_bottom) == (3, ("o_proj",), True)


@pytest.mark.parametrize(("key", "bad"), [("rank", 0), ("alpha", 0.0), ("targets", []), ("freeze_bottom", "yes")])
def test_what_is_no_adapter_is_refused(key: str, bad: Any) -> None:
    assert refused(changed(least(), {f"lora.{key}": bad})).message.startswith(f"lora.{key} = ")


@pytest.mark.parametrize(("key", "bad"), [("dropout", 1.0), ("dropout", -0.1), ("rslora", 1), ("start", 3)])
def test_what_no_adapter_can_be_is_refused(key: str, bad: Any) -> None:
    assert refused(changed(least(), {f"lora.{key}": bad})).message.startswith(f"lora.{key} = ")


def test_all_linear_stands_alone() -> None:
    lora = Recipe.of(changed(least(), {"lora.targets": "all-linear"})).lora
    assert lora.all_linear
    assert Recipe.of(changed(least(), {"lora.targets": ["all-linear"]})).lora == lora
    assert_mended(
        (
            {"lora.targets": ["q_proj", "all-linear"]},
            "lora.targets: 'all-linear' has every layer already",
            "leave the other names out",
            {"lora.targets": "all-linear"},
        )
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_another_rank_keeps_the_scale(rslora: bool) -> None:
    lora = Recipe.of(changed(least(), {"lora.rslora": rslora})).lora
    assert lora.scale == pytest.approx(16 / 8**0.5 if rslora else 2.0)
    assert lora.ranked(2).scale == pytest.approx(lora.scale)
    assert lora.ranked(2).rank == 2


def test_the_folder_to_start_from_is_relative_to_the_recipe(tmp_path: Path) -> None:
    recipe = Recipe.of(changed(least(), {"lora.start": "adapter"})).anchored(tmp_path)
    assert recipe.lora.start == str(tmp_path / "adapter")
