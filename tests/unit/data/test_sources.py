"""Data files as rows: each with its place, and errors that name the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.data.sources import read_jsonl
from isthmus.errors import DataError


def written(folder: Path, data: bytes) -> Path:
    (folder / "rows.jsonl").write_bytes(data)
    return folder / "rows.jsonl"


def test_rows_come_in_order_with_their_lines(tmp_path: Path) -> None:
    path = written(tmp_path, '{"a": 1}\n\n  \n{"a": "né\u2028x"}\r\n'.encode())
    assert [(row.place, row.fields) for row in read_jsonl(path)] == [
        (f"{path}:1", {"a": 1}),
        (f"{path}:4", {"a": "né\u2028x"}),
    ]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "holds no row"),
        (b"\n\n", "holds no row"),
        (b'{"a": 1}\n{"a": \n', r":2 is not JSON"),
        (b"[1]\n", r":1 is not a JSON object"),
        (b'{"a": "\xff"}\n', r":1 is not UTF-8"),
    ],
)
def test_what_is_no_row_is_refused_by_its_line(tmp_path: Path, data: bytes, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_jsonl(written(tmp_path, data))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the data file .*none\.jsonl"):
        read_jsonl(tmp_path / "none.jsonl")
