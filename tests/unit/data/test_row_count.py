"""Numbers of rows with which a silo can take part in a run of epochs."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.data.examples import check_examples
from isthmus.data.row_count import check_row_count
from isthmus.errors import DataError
from isthmus.recipe import Recipe
from tests.conftest import make_recipe, write_rows


def recipe(**train: object) -> Recipe:
    return make_recipe(Path("none"), train=train)


def test_without_epochs_any_number_will_do() -> None:
    for rows in (1, 10**9):
        check_row_count(recipe(rounds=100), "a", rows)


def test_too_few_and_too_many_are_refused() -> None:
    counted = recipe(epochs=2, batch=4, rounds=5, most_rows=40)
    for rows in (9, 40):
        check_row_count(counted, "a", rows)
    with pytest.raises(DataError, match=r"8 rows make 4 steps in train.epochs = 2, fewer than the 5 rounds"):
        check_row_count(counted, "a", 8)
    with pytest.raises(DataError, match="a has 41 training rows; by the recipe it may have 40"):
        check_row_count(counted, "a", 41)


def test_numbers_are_checked_with_the_rows_before_anything_starts(tmp_path: Path) -> None:
    rows = [{"prompt": "w5", "answer": "w6"}] * 3
    silo = [{"name": name, "train": str(write_rows(tmp_path / f"{name}.jsonl", rows))} for name in ("a", "b")]
    check_examples(make_recipe(Path("none"), silo=silo, train={"epochs": 1, "batch": 1, "rounds": 3}))
    with pytest.raises(DataError, match=r"^2 rows or files .*3 rows make 1 steps .*; 3 rows make 1 steps"):
        check_examples(make_recipe(Path("none"), silo=silo, train={"epochs": 1, "batch": 4, "rounds": 3}))
