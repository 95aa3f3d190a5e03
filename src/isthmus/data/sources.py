"""A silo's data files as rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.errors import DataError


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a data file."""

    place: str
    """``file:line``, for messages."""
    fields: dict[str, Any]


def read_jsonl(path: Path) -> list[SourceRow]:
    """The rows of a JSONL file, in its order; blank lines are skipped.

    Raises:
        DataError: the file is missing or has no row, or a line is not a JSON object in UTF-8.
    """
    try:
        lines = path.read_bytes().split(b"\n")  # str.splitlines would also split at U+2028, which JSON strings may hold
    except OSError as error:
        raise DataError(f"cannot read the data file {path}", remedy="check the path in the recipe") from error
    rows = [_parsed(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} holds no row", remedy="give the silo at least one row")
    return rows


def _parsed(place: str, line: bytes) -> SourceRow:
    try:
        fields: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8: {error.reason}", remedy="save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON: {error.msg}", remedy="write one JSON object per line") from error
    if not isinstance(fields, dict):
        raise DataError(f"{place} is not a JSON object", remedy="write one JSON object per line")
    return SourceRow(place, fields)
