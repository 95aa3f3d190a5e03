"""A data row as prompt and answer, by the recipe's templates."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from isthmus.errors import DataError
from isthmus.recipe import TaskSection

Span = tuple[int, int, str]
"""A stretch of a text, from character to character, and its class."""


@dataclass(frozen=True, slots=True)
class Example:
    """What the model reads and what it should answer."""

    prompt: str
    answer: str
    spans: tuple[Span, ...] = ()
    """Where in prompt and answer together the fields are that have a class."""


def read_examples(path: Path, task: TaskSection, classes: Mapping[str, str] | None = None) -> list[Example]:
    """The examples in a JSONL file.

    Args:
        classes: of those fields whose place in the texts is wanted.

    Raises:
        DataError: the file is missing, empty, not JSONL, or a row lacks text the templates name.
    """
    try:
        lines = path.read_bytes().split(b"\n")  # str.splitlines would also split at U+2028, which JSON strings may hold
    except OSError as error:
        raise DataError(f"cannot read the data file {path}", remedy="check the path in the recipe") from error
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} holds no row", remedy="give the silo at least one row")
    return [_example(f"{path}:{number}", line, task, classes or {}) for number, line in rows]


def _example(place: str, line: bytes, task: TaskSection, classes: Mapping[str, str]) -> Example:
    try:
        row: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8: {error.reason}", remedy="save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON: {error.msg}", remedy="write one JSON object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{place} is not a JSON object", remedy="write one JSON object a line")
    prompt, answer = _filled(task.prompt, row, place), _filled(task.answer, row, place)
    spans = [
        (start + moved, end + moved, kind)
        for template, moved in ((task.prompt, 0), (task.answer, len(prompt)))
        for start, end, kind in (_spans(template, row, classes) if classes else ())
    ]
    example = Example(prompt, answer, tuple(spans))
    if task.choices and example.answer not in task.choices:
        raise DataError(f"{place}: the answer {example.answer!r} is no choice", remedy="list it in task.choices")
    return example


def _spans(template: str, row: dict[str, Any], classes: Mapping[str, str]) -> Iterator[Span]:
    """Where in the filled template the fields are that have a class; the template is known to fit the row."""
    start = 0
    for literal, name, form, conversion in Formatter().parse(template):
        start += len(literal)
        if name is None:
            continue
        piece = f"{{{name}{'!' + conversion if conversion else ''}:{form}}}".format_map(row)
        field = re.split(r"[.\[]", name)[0]
        if field in classes and piece:
            yield start, start + len(piece), classes[field]
        start += len(piece)


def _filled(template: str, row: dict[str, Any], place: str) -> str:
    try:
        text = template.format_map(row)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{place} does not fill the template {template!r}: {error}", remedy="correct the row or the template"
        ) from error
    named = {name: value for name, value in row.items() if f"{{{name}}}" in template}
    empty = [name for name, value in named.items() if value in (None, [], {}) or not str(value).strip()]
    if empty:
        raise DataError(f"{place} has no text in {empty[0]!r}", remedy="fill the field or drop the row")
    return text
