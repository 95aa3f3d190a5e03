"""Recipes by which nothing trains: silos without rows are allowed, what follows from rounds is not."""

from __future__ import annotations

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import OUT, Case, assert_mended, changed, least, name_of

NOISE = {"federation.secure": True, "federation.weights": "equal", "federation.clip": {"norm": 1.0}}
REFUSED: list[Case] = [
    (
        {**NOISE, "train.rounds": 0, "federation.noise": {"epsilon": 8.0}},
        "federation.noise: with train.rounds = 0 there is no sum",
        "leave federation.noise out",
        {"federation.noise": OUT, "federation.clip": OUT},
    ),
    (
        {"train.rounds": 0, "train.epochs": 2},
        "train.epochs: nothing trains with train.rounds = 0",
        "leave epochs out",
        {"train.epochs": OUT},
    ),
    (
        {"silo.0.train": OUT},
        "silo.train: 'a' has no rows",
        "or set train.rounds = 0, for inference only",
        {"train.rounds": 0},
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_what_needs_rounds_is_refused(case: Case) -> None:
    assert_mended(case)


def test_without_rounds_no_rows_are_needed_and_none_are_measured() -> None:
    values = changed(least(), {"train": {"rounds": 0}, **{f"silo.{number}.train": OUT for number in range(3)}})
    recipe = Recipe.of(values)
    assert recipe.train.evaluate == 10
    assert not recipe.train.evaluates_after(0)
    assert not recipe.train.keeps(0)
    assert recipe.most_weight(["a"]) > 0
    for when in ("best", "end", True, 3):
        assert not Recipe.of(changed(values, {"train.evaluate": when})).train.evaluates_after(0)
