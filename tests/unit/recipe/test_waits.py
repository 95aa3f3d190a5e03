"""Times that follow from one setting, and those that are set themselves."""

from __future__ import annotations

import pytest

from isthmus.recipe import Recipe
from isthmus.recipe.waits import Waits
from tests.unit.recipe.refusals import changed, least, refused

SET = {
    "trunk.patience": "step",
    "root.patience": "round",
    "wire.deadline": "reach",
    "wire.answer_deadline": "answer",
}
"""By key, the time that it sets."""


def test_all_follow_from_patience() -> None:
    assert Recipe.of(least()).waits == Waits(step=60.0, round=300.0, reach=60.0, answer=600.0)
    assert Recipe.of(changed(least(), {"patience": 10.0})).waits == Waits(step=2.0, round=10.0, reach=2.0, answer=20.0)


@pytest.mark.parametrize("key", SET)
def test_one_that_is_set_stays_and_the_others_follow(key: str) -> None:
    waits = Recipe.of(changed(least(), {"patience": 10.0, key: 7.0})).waits
    assert waits == Waits(**({"step": 2.0, "round": 10.0, "reach": 2.0, "answer": 20.0} | {SET[key]: 7.0}))


def test_the_root_and_its_edges_wait_as_long() -> None:
    edge = {"name": "ward", "address": "localhost:7100", "silos": ["a", "b", "c"]}
    tree = Recipe.of(changed(least(), {"edge": [edge], "patience": 40.0})).tree
    assert (tree.node("root").patience, tree.node("ward").patience) == (40.0, 10.0)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), "long"])
def test_wrong_values_are_refused(wrong: object) -> None:
    assert refused(changed(least(), {"patience": wrong})).message.startswith("patience = ")
