"""A silo's rows as text, and the check of all silos' rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.data.bad_rows import BadRows
from isthmus.data.examples import check_examples, silo_examples
from isthmus.data.templates import Example
from isthmus.errors import DataError
from isthmus.recipe import SiloSection, TaskSection

TASK = TaskSection(prompt="{text}", answer="{label}")


def section(folder: Path, **keys: object) -> SiloSection:
    (folder / "a.csv").write_text("note,label\nw5,w6\n,w7\nw8,w9\n")
    values = {"name": "a", "train": str(folder / "a.csv"), "columns": {"text": "note"}}
    return SiloSection.model_validate(values | keys)


def test_examples_stand_after_their_places_and_bad_rows_are_counted(tmp_path: Path) -> None:
    silo, bad = section(tmp_path), BadRows()
    assert silo_examples(silo, silo.train, TASK, bad) == [
        (f"{tmp_path}/a.csv:2", Example("w5", "w6")),
        (f"{tmp_path}/a.csv:4", Example("w8", "w9")),
    ]
    with pytest.raises(DataError, match=r"a\.csv:3 has no text in 'text'"):
        bad.raise_any()


def test_the_format_key_says_what_a_name_does_not(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text('{"text": "w5", "label": "w6"}')
    silo = section(tmp_path, train=str(tmp_path / "rows"), columns={}, format="jsonl")
    assert [example for _, example in silo_examples(silo, silo.train, TASK, BadRows())] == [Example("w5", "w6")]


def test_bad_rows_of_all_silos_and_files_are_one_error(tmp_path: Path) -> None:
    silo = section(tmp_path, held_out=[str(tmp_path / "none.csv"), str(tmp_path / "a.csv")])
    with pytest.raises(DataError, match=r"^4 rows or files are unusable: .*a\.csv:3 .*none\.csv") as caught:
        check_examples(
            [silo, section(tmp_path, name="b", columns={"text": "nowhere"}, train=str(tmp_path / "none"))], TASK
        )
    assert "none has no name that says its format" in caught.value.message
