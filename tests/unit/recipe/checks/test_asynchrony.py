"""Asynchronous rounds: what goes together with a buffer, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT
from tests.unit.recipe.refusals import OUT, Case, assert_mended, changed, least, name_of

BUFFER = "federation.asynchronous.buffer"


def recipe(buffer: int, **changes: Any) -> Recipe:
    return Recipe.of(changed(least("abcd"), {BUFFER: buffer} | changes))


def test_without_a_buffer_a_round_is_of_all_silos() -> None:
    assert Recipe.of(least()).tree.node(ROOT).minimum == 3


def test_a_recipe_with_a_buffer_is_read_again_as_it_was(tmp_path: Path) -> None:
    first = recipe(3, **{"federation.asynchronous.staleness": 0})
    (tmp_path / "recipe.toml").write_text(first.toml())
    assert Recipe.read(tmp_path / "recipe.toml").federation == first.federation


def test_as_many_silos_are_needed_as_fill_the_buffer() -> None:
    assert (recipe(2).tree.node(ROOT).minimum, recipe(2).tree.fewest()) == (2, 2)
    assert recipe(3, root={"minimum": 1}).tree.fewest() == 1


@pytest.mark.parametrize(
    "federation",
    [
        {"lora": "plain"},
        {"compression": "top-k"},
        {"compression": {"bits": 8}},
        {"weights": "equal"},
        {"fairness": "tilted"},
        {"optimizer": "adam"},
    ],
    ids=str,
)
def test_what_goes_together(federation: dict[str, Any]) -> None:
    changes = {f"federation.{key}": value for key, value in federation.items()}
    assert recipe(4, **changes).federation.asynchronous.buffer == 4


EDGES = [{"name": "ward", "address": "localhost:1", "silos": ["a", "b"]}]
SCAFFOLD = {"federation.control": "scaffold", "federation.weights": "equal", "train.optimizer": "sgd"}
REFUSED: list[Case] = [
    ({BUFFER: 5}, "one of each silo at most, and there are 4 silos", "lower it", {BUFFER: 4}),
    ({"root.minimum": 3}, "made of 2 updates and never has 3", "lower it", {"root.minimum": 2}),
    ({"root.minimum": 3}, "root.minimum: a version", "raise federation.asynchronous.buffer", {BUFFER: 3}),
    (
        {"federation.secure": True},
        "federation.asynchronous.buffer: masks cancel within one cohort",
        "leave out buffer, or federation.secure.masks",
        {"federation.secure": OUT},
    ),
    ({"federation.secure": True}, "masks cancel within one cohort", "leave out buffer", {BUFFER: OUT}),
    ({"edge": EDGES}, "an edge passes on the sum of a round", "[[edge]]", {"edge": OUT}),
    (SCAFFOLD, "controls are the mean of all silos'", "federation.control = 'scaffold'", {"federation.control": OUT}),
    *(
        (
            {"federation.lora": lora},
            "factors an update changes",
            f"federation.lora = {lora!r}",
            {"federation.lora": OUT},
        )
        for lora in ("alternating", "svd")
    ),
    *(
        (
            {"federation.compression": kind},
            "numbers take turns",
            f"federation.compression = {kind!r}",
            {"federation.compression": OUT},
        )
        for kind in ("random-k", "sketch")
    ),
    (
        {"federation.robust": "median"},
        "they may be most",
        "federation.robust.rule = 'median'",
        {"federation.robust": OUT},
    ),
    (
        {"federation.robust": {"rule": "trimmed-mean", "mix": True}},
        "they may be most",
        "and federation.robust.mix",
        {"federation.robust.rule": OUT, "federation.robust.mix": OUT},
    ),
    (
        {"trunk.adapter": "replica"},
        "replicas are averaged when all silos are there",
        "trunk.adapter = 'replica'",
        {"trunk.adapter": OUT},
    ),
    *(
        (
            {"federation.weights": kind},
            f"federation.weights: {kind!r} compares updates of one round",
            "'examples' or 'equal'",
            {"federation.weights": "equal"},
        )
        for kind in ("agreement", "inverse-variance")
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_what_does_not_go_together_is_refused(case: Case) -> None:
    changes, *rest = case
    assert_mended(({BUFFER: 2} | changes, *rest), silos="abcd")
