"""Each format of files: rows with their places, and what is damaged by its line."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from isthmus.data.bad_rows import BadRows
from isthmus.data.formats import SUFFIXES, need_package, parse_file
from isthmus.errors import DataError


def rows(data: str | bytes, kind: str, name: str = "f") -> list[tuple[str, dict[str, Any]]]:
    """All rows, of a file in which none is bad."""
    bad = BadRows()
    found = list(parse_file(name, data.encode() if isinstance(data, str) else data, kind, bad))
    bad.raise_any()
    return found


def refused(data: str | bytes, kind: str, name: str = "f") -> str:
    with pytest.raises(DataError) as caught:
        rows(data, kind, name)
    assert caught.value.remedy
    return caught.value.message


def parquet(table: pyarrow.Table, path: Path) -> bytes:
    pyarrow.parquet.write_table(table, path)
    return path.read_bytes()


def test_jsonl_skips_blank_lines_and_keeps_unicode_separators() -> None:
    data = '\ufeff{"a": 1}\n\n  \n{"a": "né\u2028\u0085x"}\r\n'
    assert rows(data, "jsonl") == [("f:1", {"a": 1}), ("f:4", {"a": "né\u2028\u0085x"})]


@pytest.mark.parametrize(
    "data",
    [
        '[\n {"a": 1},\n\n {"a": "x\\n[]"}\n]',
        '{"version": "1", "data": [\n {"a": 1},\n\n{"a": "x\\n[]"}]}',
        '\ufeff[{"a": 1}\r\n\r\n\r\n,{"a": "x\\n[]"}]',
    ],
)
def test_json_rows_have_the_lines_on_which_they_begin(data: str) -> None:
    found = rows(data, "json")
    assert [fields for _, fields in found] == [{"a": 1}, {"a": "x\n[]"}]
    assert [place for place, _ in found] == (["f:2", "f:4"] if data[0] != "\ufeff" else ["f:1", "f:4"])


def test_objects_line_by_line_in_a_json_file_are_jsonl() -> None:
    assert rows('{"a": 1}\n{"a": 2}\n', "json") == [("f:1", {"a": 1}), ("f:2", {"a": 2})]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_rows_have_the_lines_on_which_they_begin(end: str) -> None:
    data = end.join(['\ufefftext,"la,bel"', f'"one{end}""two""",x', "", "é,"])
    assert rows(data, "csv") == [
        ("f:2", {"text": f'one{end}"two"', "la,bel": "x"}),
        ("f:5", {"text": "é", "la,bel": ""}),
    ]


def test_tsv_cells_are_separated_by_tabs() -> None:
    assert rows("a\tb\n1,5\t2\n", "tsv") == [("f:2", {"a": "1,5", "b": "2"})]


def test_a_cell_may_be_longer_than_the_csv_modules_own_limit() -> None:
    assert rows(f"a,b\n{'x' * 200_000},1\n", "csv")[0][1]["a"] == "x" * 200_000


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    table = pyarrow.table({"a": ["é", None], "n": [1, 2], "tags": [["x"], []]})
    assert rows(parquet(table, tmp_path / "f"), "parquet") == [
        ("f:row 1", {"a": "é", "n": 1, "tags": ["x"]}),
        ("f:row 2", {"a": None, "n": 2, "tags": []}),
    ]


@pytest.mark.parametrize("kind", sorted(set(SUFFIXES.values())))
def test_an_empty_file_has_no_row(kind: str) -> None:
    assert rows(b"", kind) == []


@pytest.mark.parametrize(
    ("kind", "data", "told"),
    [
        ("jsonl", b'{"a": 1}\n{"a": \n', "f:2 is not JSON"),
        ("jsonl", b"[1]\n", "f:1 is not a JSON object"),
        ("jsonl", b'\n{"a": "\xff"}\n', "f:2 is not UTF-8"),
        ("jsonl", b'{"a": "\xed\xa0\xbd"}\n', "f:1 is not UTF-8"),
        ("jsonl", b'{"a": "\\ud83d"}', "f:1 holds half of a surrogate pair, \\ud83d"),
        ("jsonl", b'{"a": {"b": ["\\uDE00\\uD83D"]}}', "f:1 holds half of a surrogate pair, \\ude00"),
        ("jsonl", b'{"\\ud83d": 1}', "f:1 holds half of a surrogate pair"),
        ("jsonl", b'{"a": 1, "b": 2, "a": 3}', "f:1 is not JSON: two values are named 'a'"),
        ("jsonl", b'{"a": ' + b"1" * 5000 + b"}", "f:1 is not JSON"),
        ("jsonl", b'{"a": ' + b"[" * 200_000 + b"}", "f:1 is not JSON: it is nested too deeply"),
        ("jsonl", '{"a": 1}'.encode("utf-16"), "f:1 is not UTF-8: it begins as UTF-16"),
        ("json", b'[{"a": 1},\n{"a": }]', "f:2 is not JSON"),
        ("json", b'[{"a": 1},\n3]', "f:2 is not a JSON object"),
        ("json", b'[\n{"a": "\\ud83d"}]', "f:2 holds half of a surrogate pair"),
        ("json", b'{"a": 1}', "f is neither a list of objects"),
        ("json", b'{"a": [{}], "b": [{}]}', "f is neither a list of objects"),
        ("json", b"3", "f is neither a list of objects"),
        ("json", b'[{"a": 1, "a": 2}]', "two values are named 'a'"),
        ("json", b"[" * 200_000, "f is not JSON: it is nested too deeply"),
        ("json", b'[\n"\xff"]', "f:2 is not UTF-8"),
        ("csv", b"a,b\n1,2\n1,2,3\n", "f:3 has 3 cells, the header has 2"),
        ("csv", b'a,b\n"x\n\n",2\n1\n', "f:5 has 1 cells, the header has 2"),
        ("csv", b"a,b,a\n1,2,3\n", "f:1 names two columns 'a'"),
        ("csv", b'a,b\n1,2\n"never, ended\n1,2\n', "f:3 is not CSV: unexpected end of data"),
        ("csv", b'a,b\n"x"y,2\n', "f:2 is not CSV"),
        ("csv", b"a,b\n1,\xe9\n", "f:2 is not UTF-8"),
        ("csv", b"text;label\nx;y\n", "f:1 names one column, 'text;label': its names are separated by ';'"),
        ("csv", b"text\tlabel\nx\ty\n", "separated by '\\t', not by ','"),
        ("tsv", b"text,label\nx,y\n", "separated by ',', not by '\\t'"),
        ("csv", "a,b\n1,2".encode("utf-16"), "f:1 is not UTF-8: it begins as UTF-16"),
        ("parquet", b"PAR1 and no more", "f is not a whole Parquet file"),
        ("parquet", b"x", "f is not a whole Parquet file"),
    ],
)
def test_what_is_no_row_is_refused_by_its_line(kind: str, data: bytes, told: str) -> None:
    assert told in refused(data, kind)


def test_text_that_is_no_utf8_in_parquet_is_refused_by_its_row(tmp_path: Path) -> None:
    data = pyarrow.array([b"fine", b"\xff\xfe"]).view(pyarrow.string())
    bad = BadRows()
    found = list(parse_file("f", parquet(pyarrow.table({"a": data}), tmp_path / "f"), "parquet", bad))
    assert found == [("f:row 1", {"a": "fine"})]
    with pytest.raises(DataError, match="f:row 2 cannot be read"):
        bad.raise_any()


def test_two_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["a", "a"])
    assert "f has two columns 'a'" in refused(parquet(table, tmp_path / "f"), "parquet")


def test_rows_after_a_bad_one_are_read() -> None:
    for kind, data, last in (
        ("jsonl", '{"a": 1}\nx\n{"a": 2}', "f:3"),
        ("csv", "a,b\n1\n2,3", "f:3"),
        ("json", '[{"a": 1},\n3,\n{"a": 2}]', "f:3"),
    ):
        bad = BadRows()
        assert [place for place, _ in parse_file("f", data.encode(), kind, bad)][-1] == last
        assert bad.count == 1


@pytest.mark.parametrize("kind", sorted(set(SUFFIXES.values())))
def test_every_format_may_be_in_a_gzip_file_whose_damage_is_noticed(kind: str, tmp_path: Path) -> None:
    table = pyarrow.table({"a": ["x"], "b": ["y"]})
    plain = {
        "jsonl": b'{"a": "x", "b": "y"}',
        "json": b'[{"a": "x", "b": "y"}]',
        "csv": b"a,b\nx,y\n",
        "tsv": b"a\tb\nx\ty\n",
        "parquet": parquet(table, tmp_path / "f"),
    }[kind]
    whole = gzip.compress(plain)
    assert [fields for _, fields in rows(whole, kind, "f.gz")] == [{"a": "x", "b": "y"}]
    for cut in (3, 10, len(whole) // 2, len(whole) - 1):
        assert "f.gz is a damaged gzip file" in refused(whole[:cut], kind, "f.gz")
    flipped = whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:]
    assert "f.gz is a damaged gzip file" in refused(flipped, kind, "f.gz")
    assert "f.gz is not a gzip file" in refused(plain, kind, "f.gz")


def test_no_damage_of_a_parquet_file_is_taken_for_rows_or_another_error(tmp_path: Path) -> None:
    """Cut anywhere, and with any byte of its footer changed: other rows are possible, another exception is not."""
    whole = parquet(pyarrow.table({"a": ["x", "y"], "n": [1, 2]}), tmp_path / "f")
    for cut in range(1, len(whole), 7):
        refused(whole[:cut], "parquet")
    for place in range(0, len(whole), 5):
        damaged = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        with suppress(DataError):
            rows(damaged, "parquet")


def test_whole_pairs_of_surrogates_are_characters() -> None:
    line = json.dumps({"a": "😀 é"})
    assert "\\ud83d" in line
    assert rows(line, "jsonl") == rows(f"[{line}]", "json") == [("f:1", {"a": "😀 é"})]


def test_an_absent_package_is_named_with_its_extra() -> None:
    with pytest.raises(DataError, match="'no_such_package_here'") as caught:
        need_package("no_such_package_here")
    assert "isthmus[data]" in caught.value.remedy
