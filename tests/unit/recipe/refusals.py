"""Recipes that are refused: the message names key and reason, and the recipe that follows the remedy is accepted."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from isthmus.errors import RecipeError
from isthmus.recipe import Recipe

Changes = dict[str, Any]
"""Values by dotted key, such as ``silo.0.name`` or ``federation.lora``."""
OUT = object()
"""In place of a value: the key is left out."""
Case = tuple[Changes, str, str, Changes]
"""What a recipe says, a part of the reason, a part of the remedy, and the remedy carried out."""


def least(silos: str = "abc") -> dict[str, Any]:
    """The values of a recipe that says nothing it need not say."""
    return {
        "model": {"path": "org/name"},
        "train": {"evaluate": False},
        "silo": [{"name": name, "train": f"{name}.jsonl"} for name in silos],
    }


def changed(values: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """The same values with some changes."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *path, last = key.split(".")
        table: Any = values
        for part in path:
            table = table[int(part)] if isinstance(table, list) else table.setdefault(part, {})
        if value is OUT:
            table.pop(last, None)
        else:
            table[last] = copy.deepcopy(value)
    return values


def refused(values: dict[str, Any]) -> RecipeError:
    """The error with which a recipe is refused."""
    with pytest.raises(RecipeError) as caught:
        Recipe.of(values)
    assert caught.value.remedy
    return caught.value


def assert_mended(case: Case, silos: str = "abc") -> None:
    """A recipe is refused with this reason and remedy, and accepted once the remedy is carried out."""
    changes, reason, remedy, mended = case
    values = changed(least(silos), changes)
    error = refused(values)
    assert reason in error.message
    assert remedy in error.remedy
    assert Recipe.of(changed(values, mended))


def name_of(case: Any) -> str | None:
    """A short name of a case for pytest."""
    return case[1][:60] if isinstance(case, tuple) else None
