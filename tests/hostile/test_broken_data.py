"""Data files as they come from anywhere: cut, in another encoding, with rows that are no rows, with any bytes at all.

A run is not created, every bad row is counted and named by its place, and once the file is mended the run is created.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.bad_rows import BadRows
from isthmus.data.formats import SUFFIXES, parse_file
from isthmus.engines.data_check import summarize_data
from isthmus.engines.local import create_run
from isthmus.errors import DataError
from isthmus.recipe import Recipe
from tests.conftest import make_recipe, save_tiny_tokenizer, tiny_config

ROWS = [{"text": f"w{number}", "label": "w9"} for number in range(4, 9)]
TASK = {"prompt": "{text}", "answer": "{label}"}


def jsonl() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def csv() -> bytes:
    return b"text,label\n" + b"".join(f"{row['text']},{row['label']}\n".encode() for row in ROWS)


def parquet() -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), out)
    return out.getvalue()


def lines(whole: bytes, **changed: bytes) -> bytes:
    """The file with some of its lines changed: ``l2`` is the second."""
    found = whole.splitlines(keepends=True)
    for line, text in changed.items():
        found[int(line[1:]) - 1] = text + b"\n"
    return b"".join(found)


BROKEN: dict[str, tuple[str, Callable[[], bytes], Callable[[bytes], bytes], str]] = {
    "cut off": ("jsonl", jsonl, lambda whole: whole[:-5], r"\.jsonl:5 is not JSON"),
    "nothing in it": ("jsonl", jsonl, lambda whole: b"\n\n", r"\.jsonl holds no row"),
    "latin-1": ("jsonl", jsonl, lambda whole: lines(whole, l3=b'{"text": "caf\xe9"}'), r"\.jsonl:3 is not UTF-8"),
    "utf-16": ("csv", csv, lambda whole: whole.decode().encode("utf-16"), r"\.csv:1 is not UTF-8: .*UTF-16"),
    "half a pair": (
        "jsonl",
        jsonl,
        lambda whole: lines(whole, l2=b'{"text": "\\ud83d", "label": "w9"}'),
        r"\.jsonl:2 holds half of a surrogate pair",
    ),
    "null, NaN and a list": (
        "jsonl",
        jsonl,
        lambda whole: lines(
            whole,
            l1=b'{"text": null, "label": "w9"}',
            l2=b'{"text": NaN, "label": "w9"}',
            l4=b'{"text": ["w4"], "label": "w9"}',
        ),
        r"^3 rows .*\.jsonl:1 has no text in 'text'; .*\.jsonl:2 has no text.*; .*\.jsonl:4 does not fill",
    ),
    "more and fewer cells": (
        "csv",
        csv,
        lambda whole: lines(whole, l2=b"w4,w9,w9", l5=b"w7"),
        r"^2 rows .*\.csv:2 has 3 cells.*\.csv:5 has 1 cells",
    ),
    "a quote that never ends": ("csv", csv, lambda whole: lines(whole, l3=b'"w5,w9'), r"\.csv:3 is not CSV"),
    "a header twice": ("csv", csv, lambda whole: lines(whole, l1=b"text,text"), r"\.csv:1 names two columns 'text'"),
    "another column": ("csv", csv, lambda whole: lines(whole, l1=b"texts,label"), r"^5 rows .*\.csv:2 does not fill"),
    "a cut gzip": ("csv.gz", lambda: gzip.compress(csv()), lambda whole: whole[:-9], r"\.csv\.gz is a damaged gzip"),
    "no gzip": ("jsonl.gz", lambda: gzip.compress(jsonl()), lambda whole: jsonl(), r"is not a gzip file"),
    "a cut Parquet": ("parquet", parquet, lambda whole: whole[:-9], r"\.parquet is not a whole Parquet file"),
}


def recipe(folder: Path, file: Path) -> Recipe:
    save_tiny_tokenizer(folder)
    tiny_config("llama").save_pretrained(folder)
    return make_recipe(folder, silo=[{"name": "a", "train": str(file)}], task=TASK)


@pytest.mark.parametrize("broken", BROKEN)
def test_no_run_is_created_until_the_file_is_mended(broken: str, tmp_path: Path) -> None:
    suffix, write, damage, told = BROKEN[broken]
    file = tmp_path / f"rows.{suffix}"
    read = recipe(tmp_path, file)
    file.write_bytes(damage(write()))
    with pytest.raises(DataError, match=told) as caught:
        create_run(read, tmp_path / "run")
    assert caught.value.remedy
    assert not (tmp_path / "run").exists()
    (silo,) = summarize_data(read).silos
    assert caught.value.message in str(silo.error)
    file.write_bytes(write())
    assert create_run(read, tmp_path / "run").recipe() is not None
    (silo,) = summarize_data(read).silos
    assert (silo.error, silo.sets["train"].rows) == (None, 5)


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(sorted(set(SUFFIXES.values()))),
    st.binary(max_size=60)
    | st.text('{}[]",:\n\r\t \\ud83de1-N\ufeff', max_size=40).map(lambda text: text.encode(errors="surrogatepass"))
    | st.binary(max_size=20).map(lambda data: b"PAR1" + data + b"PAR1")
    | st.binary(max_size=20).map(gzip.compress),
)
def test_any_bytes_are_rows_or_an_error_of_the_file(kind: str, data: bytes) -> None:
    bad = BadRows()
    with bad.collecting():
        for place, fields in parse_file("f", data, kind, bad):
            assert place.startswith("f:")
            assert isinstance(fields, dict)
    if bad.count:
        with pytest.raises(DataError) as caught:
            bad.raise_any()
        assert caught.value.remedy
