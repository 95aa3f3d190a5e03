"""A silo's rows as text, and the check of all silos' rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.data.bad_rows import BadRows
from isthmus.data.examples import check_examples, silo_examples
from isthmus.data.templates import Example
from isthmus.errors import DataError
from isthmus.recipe import Recipe
from tests.conftest import make_recipe

TASK = {"prompt": "{text}", "answer": "{label}"}


def recipe(folder: Path, *silos: dict[str, Any]) -> Recipe:
    """Of silos that read one file with a bad row, unless they say otherwise."""
    (folder / "a.csv").write_text("note,label\nw5,w6\n,w7\nw8,w9\n")
    usual = {"train": str(folder / "a.csv"), "columns": {"text": "note"}}
    named = [{"name": f"s{number}", **usual, **silo} for number, silo in enumerate(silos)]
    return make_recipe(Path("none"), silo=named, task=TASK)


def test_examples_stand_after_their_places_and_bad_rows_are_counted(tmp_path: Path) -> None:
    read, bad = recipe(tmp_path, {}), BadRows()
    expected = [(f"{tmp_path}/a.csv:2", Example("w5", "w6")), (f"{tmp_path}/a.csv:4", Example("w8", "w9"))]
    assert silo_examples(read.silo[0], read, bad) == (expected, [])
    with pytest.raises(DataError, match=r"a\.csv:3 has no text in 'text'"):
        bad.raise_any()


def test_the_format_key_says_what_a_name_does_not(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text('{"text": "w5", "label": "w6"}')
    read = recipe(tmp_path, {"train": str(tmp_path / "rows"), "columns": None, "format": "jsonl"})
    train, _ = silo_examples(read.silo[0], read, BadRows())
    assert [example for _, example in train] == [Example("w5", "w6")]


def test_bad_rows_of_all_silos_and_files_are_one_error(tmp_path: Path) -> None:
    held_out = [str(tmp_path / "none.csv"), str(tmp_path / "a.csv")]
    read = recipe(tmp_path, {"held_out": held_out}, {"columns": {"text": "nowhere"}, "train": str(tmp_path / "none")})
    with pytest.raises(DataError, match=r"^4 rows or files are unusable: .*none\.csv.*a\.csv:3 ") as caught:
        check_examples(read)
    assert "none has no name that says its format" in caught.value.message
