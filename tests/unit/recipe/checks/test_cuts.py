"""Cuts of single silos, and what they exclude."""

from __future__ import annotations

import pytest

from isthmus.errors import MismatchError
from isthmus.recipe import Recipe
from isthmus.recipe.shared import check_shared, shared_keys
from tests.unit.recipe.refusals import OUT, Case, Changes, assert_mended, changed, least, name_of

CASES: list[Case] = [
    (
        {"model.bottom": 2, "silo.1.bottom": 1},
        "silo.bottom: b would keep 1 of the 2 blocks that the trunk leaves",
        "raise it to 2 or more",
        {"silo.1.bottom": 2},
    ),
    (
        {"model.top": 3, "silo.0.top": 2},
        "silo.top: a would keep 2 of the 3 blocks that the trunk leaves",
        "lower model.top for all",
        {"model.top": 2},
    ),
    (
        {"silo.0.bottom": 4, "boundary.width": 16},
        "boundary.width: a bottleneck's layers learn the hidden states of one depth",
        "leave out boundary.width",
        {"boundary.width": OUT},
    ),
    (
        {"silo.0.bottom": 4, "lora.freeze_bottom": True, "lora.start": "adapter"},
        "lora.start: with lora.freeze_bottom a silo with a larger bottom has no adapter",
        "leave out lora.start",
        {"lora.start": OUT},
    ),
    (
        {"model.cut": "auto", "silo.1.bottom": 3},
        "model.cut: a measurement chooses one cut for all silos, and b has its own",
        "leave out silo.bottom",
        {"silo.1.bottom": OUT},
    ),
]


TRAIN: Changes = {"silo.0.bottom": 4, "federation.between": "train"}
EDGE = {"name": "e", "address": "localhost:1", "silos": ["a", "b", "c"]}
CASES += [
    (
        TRAIN | changes,
        f"federation.between: {reason}",
        "set federation.between = 'rest'",
        {"federation.between": "rest"},
    )
    for changes, reason in (
        ({"federation.secure": True}, "the root averages these blocks among some silos and the trunk, and a"),
        ({"edge": [EDGE]}, "the root averages these blocks among some silos and the trunk, and edges"),
        ({"federation.asynchronous.buffer": 2}, "the trunk's change is of a round that all silos end together"),
        ({"federation.robust": "median"}, "the root averages these blocks among some silos and the trunk, too few"),
        ({"federation.lora": "alternating"}, "the trunk trains both factors at once"),
        ({"federation.lora": "svd"}, "the trunk trains both factors at once"),
        ({"federation.weights": "equal"}, "the trunk's change counts by the tokens behind it"),
        ({"federation.fairness": "q-ffl"}, "the trunk's change counts by the tokens behind it"),
        ({"federation.normalized": True}, "the trunk's change is not of one silo's steps"),
        ({"trunk.adapter": "replica"}, "replicas are averaged within the round"),
    )
]


MOVES: Changes = {
    "model.moves": [{"after": 2, "bottom": 3}, {"after": 4, "top": 1}],
    "train.rounds": 6,
}
CASES += [
    (
        MOVES | {"model.moves": [{"after": 2}]},
        "model.moves: a move says after how many rounds",
        "write it as { after = 10, bottom = 3 }",
        {"model.moves": [{"after": 2, "bottom": 3}]},
    ),
    (
        MOVES | {"train.rounds": 4},
        "model.moves: they come after the rounds 2, 4 of 4",
        "the last one before the end",
        {"train.rounds": 5},
    ),
    (
        MOVES | {"model.moves": [{"after": 3, "bottom": 3}, {"after": 2, "bottom": 2}]},
        "model.moves: they come after the rounds 3, 2 of 6",
        "order them",
        {"model.moves": [{"after": 2, "bottom": 3}, {"after": 3, "bottom": 2}]},
    ),
    (MOVES | {"federation.lora": "svd"}, "makes new factors each round", "'plain'", {"federation.lora": "plain"}),
    *(
        (MOVES | {key: value}, f"model.moves: {reason}", "leave out", {key: OUT})
        for key, value, reason in (
            ("silo.0.bottom", 3, "the cut of all silos moves"),
            ("boundary.width", 16, "its layers learn the hidden states of one depth"),
            ("boundary.residual", True, "its layers learn the hidden states of one depth"),
            ("lora.freeze_bottom", True, "a block that moves to bottom would lose its adapter"),
            ("trunk.adapter", "replica", "a replica's block would have no one owner"),
            ("federation.updates", "gradients", "the root's moments are of one cut's tensors"),
            ("federation.optimizer", "adam", "what is kept of it is of one cut's tensors"),
            ("federation.compression", "top-k", "what is kept of it is of one cut's tensors"),
            ("federation.robust", "median", "what is kept of it is of one cut's tensors"),
            ("federation.asynchronous.buffer", 2, "the cut moves when all silos have ended a round"),
            ("federation.max_change", 1.0, "it bounds what silos change"),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_impossible_cuts_are_refused(case: Case) -> None:
    assert_mended(case)


def test_each_silo_has_its_own_ends_and_the_recipe_the_widest() -> None:
    recipe = Recipe.of(changed(least(), {"silo.0.bottom": 5, "silo.1.top": 3}))
    assert [recipe.ends(name) for name in "abc"] == [(5, 2), (2, 3), (2, 2)]
    assert recipe.widest == (5, 3)
    own = recipe.of_silo("a")
    assert (own.model.bottom, own.model.top) == (5, 2)
    assert own.ends("b") == (2, 3)
    assert own.widest == recipe.widest
    assert own.whole is recipe.of_silo("c") is recipe
    assert own.of_silo("b").whole is recipe
    assert own.of_silo("c").model == recipe.model


def test_all_parties_must_know_each_silos_cut() -> None:
    one, other = (Recipe.of(changed(least(), {"silo.0.bottom": bottom})) for bottom in (3, 4))
    assert shared_keys(one.of_silo("a")) == shared_keys(one)
    with pytest.raises(MismatchError, match=r"silo\.a\.bottom = 3, the trunk 4"):
        check_shared("b", shared_keys(one), "the trunk", shared_keys(other))


def test_moves_are_due_in_their_order_and_once() -> None:
    recipe = Recipe.of(changed(least(), MOVES))
    assert recipe.next_move(0) == recipe.next_move(2) == (2, (3, 2))
    moved = recipe.moved_to((3, 2))
    assert moved.next_move(2) == moved.next_move(4) == (4, (3, 1))
    assert moved.moved_to((3, 1)).next_move(4) is None
    assert Recipe.of(moved.model_dump(mode="json", exclude_none=True)) == moved


@pytest.mark.parametrize(
    "protects",
    [
        {"boundary.update.noise": 0.1, "boundary.update.clip": 1.0},
        {"boundary.update.clip": 1.0},
        {"federation.secure": True},
    ],
    ids=str,
)
def test_what_protects_updates_is_known(protects: Changes) -> None:
    open_updates: Changes = {"boundary.update": {"noise": 0.0, "clip": 0.0}}
    assert Recipe.of(changed(least(), open_updates)).opens_updates
    assert not Recipe.of(changed(least(), open_updates | protects)).opens_updates


def test_moves_keep_masked_rounds_of_one_step_at_changes() -> None:
    """They would send gradients otherwise, with which the root steps."""
    masked: Changes = {"federation.secure": True, "federation.lora": "plain", "train.steps": 1, "train.rounds": 6}
    assert Recipe.of(changed(least(), masked)).sends_gradients
    assert not Recipe.of(changed(least(), MOVES | masked)).sends_gradients
