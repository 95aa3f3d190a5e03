"""Evaluation needs rows."""

from __future__ import annotations

import pytest

from tests.unit.recipe.refusals import Changes, assert_mended


@pytest.mark.parametrize("mended", [{"train.evaluate": False}, {"silo.1.held_out": "rows.jsonl"}], ids=str)
def test_evaluation_without_rows_is_refused(mended: Changes) -> None:
    reason, remedy = "train.evaluate: no silo has held_out rows", "set train.evaluate = false, or name held_out files"
    assert_mended(({"train.evaluate": True}, reason, remedy, mended))
