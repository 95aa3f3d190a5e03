"""Evaluation needs rows."""

from __future__ import annotations

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import Changes, assert_mended, changed, least


@pytest.mark.parametrize("mended", [{"train.evaluate": False}, {"silo.1.held_out": "rows.jsonl"}], ids=str)
def test_evaluation_without_rows_is_refused(mended: Changes) -> None:
    reason, remedy = "train.evaluate: no silo has held_out rows", "set train.evaluate = false, or name held_out files"
    assert_mended(({"train.evaluate": True}, reason, remedy, mended))


def test_a_recipe_that_does_not_ask_for_it_needs_no_rows() -> None:
    """Where rows are held out, it is then after every tenth round."""
    values = changed(least(), {})
    values["train"].pop("evaluate", None)
    train = Recipe.of(values).train
    assert [round for round in range(train.rounds + 1) if train.evaluates_after(round)] == [0, 10, 20, 30, 40]
