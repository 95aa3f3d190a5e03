"""The keys that parties share: every key of a recipe is in one of two lists, and differences are said by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from isthmus.errors import MismatchError
from isthmus.recipe import Recipe
from isthmus.recipe.section import Section
from isthmus.recipe.shared import FREE, LONGEST, SHARED, check_shared, shared_keys
from tests.conftest import make_recipe

LISTS = """
Every key of a recipe is in one of two lists of isthmus.recipe.shared:
- SHARED (its table in _TABLES): silo, trunk and root must have the same value. Take this one if the key changes what a
  run computes, releases or sends. All values cross in the greeting, so nothing secret may be in one.
- FREE, with the reason: a party may have its own value (paths, devices, how long it waits).
A path whose file must be the same is free, and a digest of the file goes into model/agreement.agreed_keys.
"""


def keys_of(section: type[Section], prefix: str = "") -> Iterator[str]:
    """All keys of a table and its subtables, as the lists call them."""
    for name, field in section.model_fields.items():
        found = list(sections_in(field.annotation))
        if found and get_origin(field.annotation) is not dict:
            for one in found:
                yield from keys_of(one, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for one in get_args(annotation):
        yield from sections_in(one)


def test_every_key_is_in_one_list() -> None:
    keys = set(keys_of(Recipe))
    unlisted, unknown, twice = keys - SHARED - FREE.keys(), (SHARED | FREE.keys()) - keys, SHARED & FREE.keys()
    assert not unlisted, f"{sorted(unlisted)} are in no list.{LISTS}"
    assert not unknown, f"{sorted(unknown)} are no keys of a recipe any more; take them out of isthmus.recipe.shared"
    assert not twice, f"{sorted(twice)} are in both lists.{LISTS}"
    assert all(FREE.values())


def test_the_page_about_shared_keys_lists_all_that_are_free() -> None:
    page = (Path(__file__).parents[3] / "docs" / "features" / "shared-keys.md").read_text()
    listed = {key for line in page.splitlines() if line.startswith("| `") for key in re.findall(r"`([\w.]+)`", line)}
    assert listed == FREE.keys()


def test_what_crosses_is_shared_and_nothing_else() -> None:
    recipe = make_recipe(Path("secret"), silos=("a", "b"), edge=[{"name": "e", "address": "x:1", "silos": ["a", "b"]}])
    keys = shared_keys(recipe)
    assert keys["train.learning_rate"] == "0.0005"
    assert json.loads(keys["silo.name"]) == ["a", "b"]
    assert json.loads(keys["edge.e.silos"]) == ["a", "b"]
    assert keys["lora.targets"] == '["q_proj", "v_proj"]'
    assert "boundary.defence.answer" not in keys
    free = {key for key in keys if key in FREE or key.endswith((".train", ".address", ".device"))}
    assert not free
    assert "secret" not in str(keys)


def test_a_long_value_crosses_as_its_beginning_and_its_hash() -> None:
    first, second = (shared_keys(make_recipe(Path("m"), task={"prompt": "ab" * 500 + end})) for end in "xy")
    assert len(first["task.prompt"]) < LONGEST
    assert first["task.prompt"].startswith('"abab')
    assert first["task.prompt"] != second["task.prompt"]


def test_a_silos_own_recipe_has_the_keys_of_the_federations() -> None:
    recipe = make_recipe(Path("m"), federation={"lora": "svd"}, silo=[{"name": "a", "train": "a", "rank": 2}])
    assert recipe.of_silo("a").lora != recipe.lora
    assert shared_keys(recipe.of_silo("a")) == shared_keys(recipe)
    assert recipe.of_silo("a").whole is recipe
    assert recipe.whole is recipe


@pytest.mark.parametrize(
    ("theirs", "own", "told"),
    [
        ({"x": "1"}, {"x": "2"}, "north has x = 1, the trunk 2"),
        ({}, {"x": "2"}, "north has x = none, the trunk 2"),
        ({"x": "1"}, {}, "north has x = 1, the trunk none"),
        ({"x": "1", "y": "3", "z": "0"}, {"x": "2", "y": "4", "z": "0"}, "x = 1, the trunk 2; y = 3, the trunk 4"),
    ],
)
def test_a_difference_names_key_and_both_values(theirs: dict[str, str], own: dict[str, str], told: str) -> None:
    with pytest.raises(MismatchError, match=told) as caught:
        check_shared("north", theirs, "the trunk", own)
    assert "recipes" in caught.value.remedy


def test_many_differences_are_counted() -> None:
    theirs = {f"key{number:02}": "1" for number in range(50)}
    with pytest.raises(MismatchError, match=r"key09 = 1, the trunk none; and 40 more\n"):
        check_shared("north", theirs, "the trunk", {})
    check_shared("north", theirs, "the trunk", dict(theirs))
