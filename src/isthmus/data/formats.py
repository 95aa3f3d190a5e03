"""What data files are written in: the bytes of a file as rows, each with its place in the file.

A place is ``file:line``, where the line is that on which the row begins, or ``file:row N`` in files without lines.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from isthmus.data.bad_rows import BadRows
from isthmus.errors import DataError

FileFields = dict[str, Any]
"""A row: its values by the names of the columns."""
FileRows = Iterator[tuple[str, FileFields]]
"""Rows, each after its place."""

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""Format by the end of a file's name, which ``.gz`` may follow."""
_GZIP, _BOM = b"\x1f\x8b", b"\xef\xbb\xbf"
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape of half of a surrogate pair in JSON, which may have its other half beside it."""
_CELL = 2**31 - 1
"""Most characters of a cell; the csv module's own limit is 128 KiB, less than some documents."""
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def parse_file(name: str, data: bytes, kind: str, bad: BadRows) -> FileRows:
    """The rows of one file.

    Args:
        name: the file's, for places.
        data: its bytes, which may be those of a gzip file.
        kind: one of the values of ``SUFFIXES``.
        bad: gets each row that cannot be used, where the rows after it can.

    Raises:
        DataError: the whole file cannot be used, or the rest of it.
    """
    try:
        yield from _PARSERS[kind](name, _unzipped(name, data), bad)
    except RecursionError as error:
        raise DataError(f"{name} is nested too deeply", remedy="write flat rows") from error


def need_package(module: str) -> None:
    """Import a package of the extra ``data``.

    Raises:
        DataError: it is not installed.
    """
    try:
        __import__(module)
    except ImportError as error:
        raise DataError(
            f"reading this needs the package {module!r}, which is not installed",
            remedy="install it with: pip install 'isthmus[data]'",
        ) from error


def arrow_rows(name: str, batches: Iterator[Any], bad: BadRows) -> FileRows:
    """The rows of Arrow's record batches or tables, at places ``name:row N``."""
    number = 0
    for batch in batches:
        repeated = _repeated(batch.schema.names)
        if repeated is not None:
            raise DataError(f"{name} has two columns {repeated!r}", remedy="rename one of them")
        for fields in _batch_rows(batch):
            number += 1
            with bad.collecting():
                if isinstance(fields, Exception):
                    raise DataError(f"{name}:row {number} cannot be read: {fields}", remedy="write the file again")
                yield f"{name}:row {number}", fields


def _batch_rows(batch: Any) -> Iterator[FileFields | Exception]:
    """The rows of one batch, or in place of a row why it has no values in Python: its text is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield error


def _unzipped(name: str, data: bytes) -> bytes:
    """The bytes in a gzip file, or these bytes if they are no gzip file's."""
    if not data.startswith(_GZIP):
        if name.endswith(".gz") and data:
            raise DataError(f"{name} is not a gzip file", remedy="copy the file again, or rename it without .gz")
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{name} is a damaged gzip file: {error}", remedy="copy or compress the file again") from error


def _text(name: str, data: bytes) -> str:
    """The text in UTF-8, without its byte order mark."""
    _refuse_utf16(name, data)
    try:
        return data.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line} is not UTF-8: {error.reason}", remedy="save the file as UTF-8") from error


def _refuse_utf16(name: str, data: bytes) -> None:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name}:1 is not UTF-8: it begins as UTF-16 does", remedy="save the file as UTF-8")


def _jsonl(name: str, data: bytes, bad: BadRows) -> FileRows:
    """Blank lines are skipped."""
    _refuse_utf16(name, data)
    lines = data.removeprefix(_BOM).split(b"\n")  # str.splitlines would also split at U+2028, which JSON may hold
    for number, line in enumerate(lines, 1):
        if line.strip():
            with bad.collecting():
                yield f"{name}:{number}", jsonl_row(f"{name}:{number}", line)


def jsonl_row(place: str, line: bytes) -> FileFields:
    """The row of one line of JSONL.

    Raises:
        DataError: it is not UTF-8, no JSON object, or no text (see ``parse_file``).
    """
    try:
        text = line.decode()
        fields = _loaded(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8: {error.reason}", remedy="save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON: {_why(error)}", remedy="write one JSON object per line") from error
    return _row(place, fields, _HALF_PAIR.search(text) is not None, "write one JSON object per line")


def _json(name: str, data: bytes, bad: BadRows) -> FileRows:
    """A list of objects, or an object in which one value is such a list. Of objects line by line it is JSONL."""
    text = _text(name, data)
    if not text.strip():
        return
    remedy = 'write [{"name": "value"}, ...], or one object per line in a file named .jsonl'
    try:
        whole = _loaded(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _jsonl(name, data, bad)
            return
        raise DataError(f"{name}:{error.lineno} is not JSON: {error.msg}", remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not JSON: {_why(error)}", remedy=remedy) from error
    start = _list_start(text, whole)
    if start is None:
        raise DataError(f"{name} is neither a list of objects nor an object with one such list", remedy=remedy)
    line, before, escaped = 1, 0, _HALF_PAIR.search(text) is not None
    for position, value in _elements(text, start):
        line, before = line + text.count("\n", before, position), position
        with bad.collecting():
            yield f"{name}:{line}", _row(f"{name}:{line}", value, escaped, remedy)


def _list_start(text: str, whole: Any) -> int | None:
    """Place of the ``[`` of a valid document's rows: of the document itself, or of its one value that is a list."""
    start = _skipped(text, 0)
    if isinstance(whole, list):
        return start
    if not isinstance(whole, dict):
        return None
    lists = [key for key, value in whole.items() if isinstance(value, list) and all(isinstance(v, dict) for v in value)]
    if len(lists) != 1:
        return None
    start += 1
    while True:
        key, end = _DECODER.raw_decode(text, _skipped(text, start))
        value = _skipped(text, _skipped(text, end) + 1)
        if key == lists[0]:
            return value
        start = _skipped(text, _DECODER.raw_decode(text, value)[1]) + 1


def _elements(text: str, start: int) -> Iterator[tuple[int, Any]]:
    """The values of a valid document's list that begins at ``start``, each after its place."""
    place = _skipped(text, start + 1)
    while text[place] != "]":
        value, end = _DECODER.raw_decode(text, place)
        yield place, value
        place = _skipped(text, end)
        if text[place] == ",":
            place = _skipped(text, place + 1)


def _skipped(text: str, place: int) -> int:
    """The place of the next character that is no white space of JSON."""
    match = _SPACE.match(text, place)
    assert match is not None
    return match.end()


def _loaded(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: Sequence[tuple[str, Any]]) -> FileFields:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError(f"two values are named {_repeated([name for name, _ in pairs])!r}")
    return fields


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _row(place: str, value: Any, escaped: bool, remedy: str) -> FileFields:
    """A value of JSON, if it is an object of whole characters.

    Args:
        escaped: whether half of a surrogate pair is escaped in it, with or without the other half.
    """
    if not isinstance(value, dict):
        raise DataError(f"{place} is not a JSON object", remedy=remedy)
    try:
        if escaped:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise DataError(
            f"{place} holds half of a surrogate pair, \\u{half:x}, which is no character",
            remedy="write both halves, or the character itself in UTF-8",
        ) from error
    return value


def _csv(name: str, data: bytes, bad: BadRows, delimiter: str = ",") -> FileRows:
    """The first row names the columns. Cells may be quoted, and then hold line ends; blank lines are skipped."""
    csv.field_size_limit(_CELL)
    reader = csv.reader(io.StringIO(_text(name, data), newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    for line, cells in _csv_rows(name, reader):
        if not header:
            header = _checked_header(f"{name}:{line}", cells, delimiter)
            continue
        with bad.collecting():
            if len(cells) != len(header):
                raise DataError(
                    f"{name}:{line} has {len(cells)} cells, the header has {len(header)}",
                    remedy='put cells that hold commas, tabs or line ends in quotes: "a, b"',
                )
            yield f"{name}:{line}", dict(zip(header, cells, strict=True))


def _csv_rows(name: str, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each after the number of its first line."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{name}:{line} is not CSV: {error}; the rows after it cannot be told apart",
                remedy='write a quote within a quoted cell twice: "a ""b"" c"; end each quoted cell with a quote',
            ) from error
        if cells is None:
            return
        if cells:
            yield line, cells


def _checked_header(place: str, cells: list[str], delimiter: str) -> list[str]:
    repeated = _repeated(cells)
    if repeated is not None:
        raise DataError(f"{place} names two columns {repeated!r}", remedy="rename one of them in the header")
    if len(cells) == 1 and (other := re.search(r"[;\t,|]", cells[0].replace(delimiter, ""))):
        raise DataError(
            f"{place} names one column, {cells[0]!r}: its names are separated by {other[0]!r}, not by {delimiter!r}",
            remedy="save the file with commas (CSV) or tabs (TSV); silo.format says which, whatever its name",
        )
    return cells


def _tsv(name: str, data: bytes, bad: BadRows) -> FileRows:
    return _csv(name, data, bad, delimiter="\t")


def _parquet(name: str, data: bytes, bad: BadRows) -> FileRows:
    need_package("pyarrow")
    import pyarrow
    import pyarrow.parquet

    if not data:
        return
    try:
        batches = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).iter_batches()
        yield from arrow_rows(name, batches, bad)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        why = str(error).strip().splitlines()
        raise DataError(
            f"{name} is not a whole Parquet file: {why[0] if why else type(error).__name__}",
            remedy="copy or write the file again",
        ) from error


def _repeated(names: Sequence[str]) -> str | None:
    """The first name that stands twice."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


_PARSERS: dict[str, Callable[[str, bytes, BadRows], FileRows]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
}
