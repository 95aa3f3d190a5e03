"""Sources as rows: the same rows from every format, folders, patterns, sets of datasets; columns renamed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.data.bad_rows import BadRows
from isthmus.data.sources import read_rows
from isthmus.errors import DataError

Row = dict[str, str]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.text(
    " \t\r\n\",;'\\\ufeffé\u2028", max_size=8
)
"""Any text but halves of surrogate pairs, and often what formats are written with."""


def as_separated(delimiter: str) -> Callable[[list[Row]], bytes]:
    def write(rows: list[Row]) -> bytes:
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode()

    return write


def as_parquet(rows: list[Row]) -> bytes:
    out = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return bytes(out.getvalue())


WRITERS: dict[str, Callable[[list[Row]], bytes]] = {
    ".jsonl": lambda rows: b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\r\n" for row in rows),
    ".ndjson": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    ".json": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows, ensure_ascii=False, indent=1).encode(),
    ".set.json": lambda rows: json.dumps({"version": 1, "data": rows}).encode(),
    ".csv": as_separated(","),
    ".bom.csv": lambda rows: b"\xef\xbb\xbf" + as_separated(",")(rows),
    ".tsv": as_separated("\t"),
    ".parquet": as_parquet,
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4),
    st.lists(TEXT.filter(lambda name: bool(name.strip())), min_size=2, max_size=2, unique=True),
)
def test_the_same_rows_come_from_every_format(tmp_path: Path, texts: list[tuple[str, str]], names: list[str]) -> None:
    rows = [dict(zip(names, text, strict=True)) for text in texts]
    for suffix, write in WRITERS.items():
        for data, end in ((write(rows), ""), (gzip.compress(write(rows)), ".gz")):
            path = tmp_path / f"rows{suffix}{end}"
            path.write_bytes(data)
            assert [row.fields for row in read_rows([str(path)])] == rows, path.name


def written(path: Path, *texts: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"a": text}) + "\n" for text in texts))
    return str(path)


def texts(*sources: str) -> list[str]:
    return [row.fields["a"] for row in read_rows(sources)]


def test_several_files_are_read_in_order_and_each_once(tmp_path: Path) -> None:
    one, two = written(tmp_path / "1.jsonl", "x", "y"), written(tmp_path / "2.jsonl", "z")
    assert texts(two, one) == ["z", "x", "y"]
    assert texts(two, str(tmp_path / "*.jsonl"), f"{tmp_path}/../{tmp_path.name}/1.jsonl") == ["z", "x", "y"]
    assert [row.place for row in read_rows([one])] == [f"{one}:1", f"{one}:2"]


def test_a_folder_is_all_its_data_files_by_name(tmp_path: Path) -> None:
    written(tmp_path / "b.jsonl", "b")
    written(tmp_path / "a" / "deep.jsonl", "a")
    written(tmp_path / ".cache" / "hidden.jsonl", "no")
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "c.CSV").write_text("a\nc\n")
    assert texts(str(tmp_path)) == ["a", "b", "c"]
    assert texts(f"{tmp_path}/**/*.jsonl") == ["a", "b"]


def test_a_name_with_the_characters_of_patterns_is_a_name(tmp_path: Path) -> None:
    written(tmp_path / "r1.jsonl", "other")
    assert texts(written(tmp_path / "r[1].jsonl", "this")) == ["this"]
    written(tmp_path / "year [2025]" / "a.jsonl", "a")
    written(tmp_path / "year [2025]" / "deep" / "b.jsonl", "b")
    assert texts(f"{tmp_path}/year [2025]/*.jsonl") == ["a"]
    assert texts(f"{tmp_path}/year [2025]/**/[b].jsonl") == ["b"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none.jsonl", "cannot read the data file"),
        ("*.tsv", "no file matches"),
        ("empty", "is a folder without data files"),
        ("rows.txt", "has no name that says its format"),
        ("blank.jsonl", "holds no row"),
        ("header.csv", "holds no row"),
    ],
)
def test_what_gives_no_rows_is_named_and_the_rest_is_read(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.txt").write_text('{"a": "x"}')
    (tmp_path / "blank.jsonl").write_text("\n")
    (tmp_path / "header.csv").write_text("a,b\n")
    source = str(tmp_path / name)
    with pytest.raises(DataError, match=told) as caught:
        read_rows([source])
    assert name in caught.value.message
    assert caught.value.remedy
    assert [row.fields for row in read_rows([str(tmp_path / "rows.txt")], format="jsonl")] == [{"a": "x"}]
    bad = BadRows()
    rows = read_rows([source, written(tmp_path / "good.jsonl", "x")], bad=bad)
    assert [row.fields for row in rows] == [{"a": "x"}]
    assert bad.count == 1


def test_columns_get_the_recipes_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("note,code\nx,1\ny,2\n")
    found = read_rows([str(path)], columns={"text": "note", "note": "code", "label": "code"})
    assert [row.fields for row in found] == [
        {"note": "1", "code": "1", "text": "x", "label": "1"},
        {"note": "2", "code": "2", "text": "y", "label": "2"},
    ]
    with pytest.raises(DataError, match=r"2 rows .*rows\.csv:2 has no column 'text', only 'note', 'code'"):
        read_rows([str(path)], columns={"prompt": "text"})


def test_all_bad_rows_of_all_files_are_counted(tmp_path: Path) -> None:
    one, two = tmp_path / "1.jsonl", tmp_path / "2.csv"
    one.write_text("no\n" * 7 + '{"a": "x"}\n')
    two.write_text("a,b\n1\n2,3\n")
    with pytest.raises(DataError, match=r"^9 rows or files are unusable: .*1\.jsonl:1 .*; and 4 more"):
        read_rows([str(one), str(two), str(tmp_path / "none.csv")])


def test_saved_sets_are_read_by_split_with_the_names_of_classes(tmp_path: Path) -> None:
    features = datasets.Features({"a": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    one = datasets.Dataset.from_dict({"a": ["é", "y\n"], "label": [1, -1]}, features=features)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "saved")
    rows = read_rows([str(tmp_path / "saved" / "train")])
    assert [row.fields for row in rows] == [{"a": "é", "label": "yes"}, {"a": "y\n", "label": None}]
    assert rows[1].place == f"{tmp_path}/saved/train:row 2"
    with pytest.raises(DataError, match="holds several splits: train, test") as caught:
        read_rows([str(tmp_path / "saved")])
    assert str(tmp_path / "saved" / "train") in caught.value.remedy
    next((tmp_path / "saved" / "test").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(DataError, match="not a whole set"):
        read_rows([str(tmp_path / "saved" / "test")])


def test_no_flipped_byte_of_a_saved_set_ends_the_process_or_is_another_error(tmp_path: Path) -> None:
    """Arrow maps a file and believes its offsets: unchecked, wrong ones read memory that is not the file's."""
    datasets.Dataset.from_dict({"a": ["one", "two", "three"], "n": [1, 2, 3]}).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    whole, refused = file.read_bytes(), 0
    for place in range(0, len(whole), 9):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        bad = BadRows()
        read_rows([str(tmp_path / "saved")], bad=bad)
        refused += bad.count > 0
    assert refused > 5
    file.write_bytes(whole)
    assert len(read_rows([str(tmp_path / "saved")])) == 3


def test_names_that_no_system_has_are_refused(tmp_path: Path) -> None:
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    for source in ("a\0b.jsonl", "x" * 5000 + ".jsonl", f"{tmp_path}/circle.jsonl", f"{tmp_path}/circle.jsonl/*.csv"):
        with pytest.raises(DataError, match=r"cannot read the data file|no file matches") as caught:
            read_rows([source])
        assert caught.value.remedy


def test_a_set_is_loaded_by_its_name_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    written(tmp_path / "set" / "train.jsonl", "x", "y")
    written(tmp_path / "set" / "test.jsonl", "z")
    source = f"datasets:{tmp_path}/set"
    assert texts(f"{source}:test", f"{source}:train[:1]") == ["z", "x"]
    assert read_rows([f"{source}:test"])[0].place == f"{source}:test:row 1"
    for wrong, told in (("", "holds the splits"), (":", "holds the splits"), (":dev", 'Unknown split "dev"')):
        with pytest.raises(DataError, match=told):
            read_rows([source + wrong])
    with pytest.raises(DataError, match="cannot load datasets:nobody/nothing:train") as caught:
        read_rows(["datasets:nobody/nothing:train"])
    assert "datasets:NAME" in caught.value.remedy


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "rows.parquet"), ("datasets", "datasets:a/b:train")])
def test_without_the_extra_other_formats_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, source: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=f"needs the package '{package}'") as caught:
        read_rows([str(tmp_path / source) if "." in source else source])
    assert "pip install 'isthmus[data]'" in caught.value.remedy
    assert texts(written(tmp_path / "rows.jsonl", "x")) == ["x"]
