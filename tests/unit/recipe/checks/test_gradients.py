"""Gradients as updates: what they cannot be beside, and when they are sent without being asked for."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import OUT, Case, Changes, assert_mended, changed, least, name_of

GRADIENTS: Changes = {"federation.updates": "gradients"}
REFUSED: list[Case] = [
    ({"train.steps": 2}, "several steps has no one gradient", "set train.steps = 1", {"train.steps": 1}),
    ({"train.epochs": 2}, "several steps", "leave train.epochs and", {"train.epochs": OUT}),
    ({"silo.1.steps": 3}, "several steps", "silo.steps out", {"silo.1.steps": OUT}),
    (
        {"federation.asynchronous.buffer": 2},
        "a late gradient",
        "leave federation.asynchronous.buffer out",
        {"federation.asynchronous": OUT},
    ),
    (
        {"federation.optimizer": "adam"},
        "the root steps by train.optimizer",
        "leave federation.optimizer out",
        {"federation.optimizer": OUT},
    ),
    ({"federation.lora": "svd"}, "new factors", "set federation.lora = 'frozen-a'", {"federation.lora": "frozen-a"}),
    (
        {"federation.control": "scaffold", "federation.weights": "equal", "train.optimizer": "sgd"},
        "goes not astray",
        "set federation.control = 'none'",
        {"federation.control": "none"},
    ),
    (
        {"federation.normalized": True},
        "the root's one step",
        "set federation.normalized = false",
        {"federation.normalized": False},
    ),
    (
        {"federation.between": "train"},
        "is a change",
        "set federation.between = 'rest'",
        {"federation.between": "rest"},
    ),
    ({"train.proximal": 0.1}, "away from its start", "leave train.proximal out", {"train.proximal": OUT}),
]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_what_gradients_cannot_be_beside_is_refused(case: Case) -> None:
    changes, reason, remedy, mended = case
    assert_mended((GRADIENTS | changes, reason, remedy, mended))
    assert_mended((GRADIENTS | changes, "federation.updates: ", "or updates = 'changes'", {"federation.updates": OUT}))


def test_a_quality_is_of_a_model_that_the_silo_trained() -> None:
    values = changed(least(), GRADIENTS | {"federation.weights": "quality", "silo.0.held_out": "h.jsonl"})
    for silo in values["silo"]:
        silo["held_out"] = "h.jsonl"
    with pytest.raises(Exception, match="no model of its own step"):
        Recipe.of(values)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"federation.secure": True}, True),
        ({"federation.secure": True, "train.steps": 2}, False),
        ({"federation.secure": True, "federation.normalized": True}, False),
        ({"federation.secure": True, "federation.updates": "changes"}, False),
        ({"federation.updates": "gradients"}, True),
        ({"federation.updates": "changes"}, False),
    ],
    ids=str,
)
def test_left_out_they_are_sent_where_the_root_sees_sums_alone(changes: dict[str, Any], expected: bool) -> None:
    """An open gradient of few rows gives their text away; a change by one step of Adam shows signs."""
    assert Recipe.of(changed(least(), changes)).sends_gradients is expected
