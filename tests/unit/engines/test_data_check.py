"""The check of all silos' rows in tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.engines.data_check import check_lengths
from isthmus.engines.local import create_run
from isthmus.errors import DataError
from isthmus.recipe import Recipe
from tests.conftest import make_recipe, save_tiny_tokenizer, write_rows


def recipe(folder: Path, **train: object) -> Recipe:
    save_tiny_tokenizer(folder)
    rows = [{"prompt": "w5 w6", "answer": "w7"}, {"prompt": "w5 w6 w7 w8", "answer": "w9"}]
    silos = [
        {"name": name, "train": str(write_rows(folder / f"{name}.jsonl", rows[:length]))}
        for name, length in (("a", 1), ("b", 2), ("c", 2))
    ]
    return make_recipe(folder, silo=silos, train=train)


def test_all_silos_long_rows_are_counted_before_anything_starts(tmp_path: Path) -> None:
    refusing = recipe(tmp_path, max_tokens=5, long_rows="refuse")
    with pytest.raises(DataError, match=r"^2 rows .*b\.jsonl:2 has 6 tokens.*; .*c\.jsonl:2 has 6"):
        create_run(refusing, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_lengths(recipe(tmp_path, max_tokens=6, long_rows="refuse"))
    assert create_run(recipe(tmp_path, max_tokens=5), tmp_path / "run").recipe().train.long_rows == "truncate"
