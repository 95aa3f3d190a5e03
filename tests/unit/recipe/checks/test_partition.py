"""Every silo has rows: its own, or a part of one set."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from isthmus.errors import RecipeError
from isthmus.recipe import Recipe

PARTS: dict[str, Any] = {
    "model": {"path": "m"},
    "train": {"evaluate": False},
    "partition": {"data": "all.jsonl"},
    "silo": [{"name": "a"}, {"name": "b", "train": "b.jsonl"}],
}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"partition": None}, "silo.train: 'a' has no rows"),
        ({"silo": [{"name": "b", "train": "b.jsonl"}]}, "partition: every silo has rows of its own"),
        (
            {"partition": {"data": "all.jsonl", "held_out": 0.2}, "silo": [{"name": "a", "held_out": "h.jsonl"}]},
            "partition.held_out: 'a' has held_out rows of its own",
        ),
        ({"train": {"evaluate": True}}, "train.evaluate: no silo has held_out rows"),
    ],
)
def test_silos_without_rows_and_sets_without_silos_are_refused(changes: dict[str, Any], told: str) -> None:
    Recipe.of(copy.deepcopy(PARTS))
    with pytest.raises(RecipeError, match=told) as caught:
        Recipe.of({key: value for key, value in {**PARTS, **changes}.items() if value is not None})
    assert caught.value.remedy


def test_a_share_of_the_set_is_rows_to_evaluate_on() -> None:
    share = {**PARTS, "train": {}, "partition": {"data": "all.jsonl", "held_out": 0.2}}
    assert Recipe.of(share).evaluating == {"a"}
