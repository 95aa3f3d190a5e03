"""``[federation]``: bare values in place of subtables, keys that moved, and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.recipe import FederationSection, Recipe
from tests.unit.recipe.refusals import OUT, changed, least, refused

MOVED = {
    "masks": (True, "secure.masks"),
    "range": (0.5, "secure.range"),
    "keep": (0.1, "compression.keep"),
    "bits": (8, "compression.bits"),
    "feedback": (False, "compression.feedback"),
    "rule": ("median", "robust.rule"),
    "malicious": (0.3, "robust.malicious"),
    "mix": (True, "robust.mix"),
    "buffer": (2, "asynchronous.buffer"),
    "staleness": (3, "asynchronous.staleness"),
}


@pytest.mark.parametrize("key", MOVED)
def test_a_key_that_moved_names_its_place(key: str) -> None:
    value, now = MOVED[key]
    values = changed(least(), {f"federation.{key}": value})
    error = refused(values)
    assert error.message == f"the key 'federation.{key}' has moved"
    assert error.remedy == f"write federation.{now} in its place"
    assert Recipe.of(changed(values, {f"federation.{key}": OUT, f"federation.{now}": value}))


def test_every_key_that_moved_is_tried() -> None:
    assert {**{key: now for key, (_, now) in MOVED.items()}, "trusted": "robust.trusted"} == FederationSection.moved


@pytest.mark.parametrize(
    ("key", "main", "value"),
    [
        ("weights", "kind", "equal"),
        ("fairness", "kind", "tilted"),
        ("optimizer", "kind", "yogi"),
        ("compression", "kind", "sketch"),
        ("robust", "rule", "median"),
        ("secure", "masks", True),
    ],
)
def test_a_bare_value_sets_the_main_key(key: str, main: str, value: Any) -> None:
    bare, table = FederationSection.model_validate({key: value}), FederationSection.model_validate({key: {main: value}})
    assert bare == table
    assert getattr(getattr(bare, key), main) == value


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"federation.optimizer": 3}, "federation.optimizer"),
        ({"federation.asynchronous": 2}, "federation.asynchronous"),
        ({"federation.noise": "silos"}, "federation.noise"),
        ({"federation.secure": "yes"}, "federation.secure.masks"),
        ({"federation.control": "Scaffold"}, "federation.control"),
        ({"federation.control": "mime"}, "federation.control"),
        ({"federation.control": True}, "federation.control"),
        ({"federation.normalized": "yes"}, "federation.normalized"),
        ({"federation.normalized": 1}, "federation.normalized"),
        ({"federation.lora": "average"}, "federation.lora"),
        ({"federation.lora": "frozen-b"}, "federation.lora"),
    ],
    ids=str,
)
def test_a_wrong_value_names_its_key(changes: dict[str, Any], key: str) -> None:
    error = refused(changed(least(), changes))
    assert error.message.startswith(f"{key} = ")
    assert error.remedy == f"correct the value of {key}"


def test_by_default_nothing_of_it_is_on() -> None:
    section = FederationSection()
    assert (section.normalized, section.control, section.noise, section.clip) == (False, "none", None, None)
    assert (section.secure.masks, section.robust.active, section.compression.exact) == (False, False, True)
    assert (section.asynchronous.buffer, section.asynchronous.staleness) == (None, 10)
    assert (section.weights.kind, section.fairness.kind, section.optimizer.kind) == ("examples", "none", "none")


def test_a_recipe_with_all_of_it_is_read_again_as_it_was(tmp_path: Path) -> None:
    federation = {
        "secure": True,
        "weights": "equal",
        "fairness": {"kind": "q-ffl", "bound": 8},
        "optimizer": {"kind": "adam", "learning_rate": 0.01, "momentum": 0.5, "adaptivity": 1e-4},
        "compression": {"kind": "sketch", "bits": 8},
    }
    first = Recipe.of(changed(least(), {"federation": federation}))
    (tmp_path / "recipe.toml").write_text(first.toml())
    assert Recipe.read(tmp_path / "recipe.toml").federation == first.federation
