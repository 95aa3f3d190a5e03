"""Data rows as prompts and answers: the recipe's templates, filled with a row's fields."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from string import Formatter
from typing import Any

from isthmus.data.sources import SourceRow, read_rows
from isthmus.errors import DataError
from isthmus.recipe import TaskSection

FieldSpan = tuple[int, int, str]
"""First character, character after the last, and sensitivity class of a part of a text."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row as text for the model."""

    prompt: str
    answer: str
    spans: tuple[FieldSpan, ...] = ()
    """Places, in prompt + answer, of the fields that have a sensitivity class."""

    def answered(self, answer: str) -> Example:
        """The example with another answer, all of which has the classes of this one's fields."""
        start = len(self.prompt)
        spans = [span if span[0] < start else (start, start + len(answer), span[2]) for span in self.spans]
        return Example(self.prompt, answer, tuple(spans))


def read_examples(path: Path, task: TaskSection, classes: Mapping[str, str] | None = None) -> list[Example]:
    """The examples of a data file, in its order.

    Args:
        classes: sensitivity class by field name; the places of these fields are returned in ``Example.spans``.

    Raises:
        DataError: the file is missing, empty or unreadable, a row lacks text for a field of the templates, or its
            answer is none of the task's choices.
    """
    return [fill_templates(row, task, classes or {}) for row in read_rows([str(path)])]


def fill_templates(row: SourceRow, task: TaskSection, classes: Mapping[str, str]) -> Example:
    """The task's prompt and answer for one row.

    Args:
        classes: sensitivity class by field name.

    Raises:
        DataError: the row lacks text for a field of the templates, or its answer is none of the task's choices.
    """
    prompt, answer = _fill(task.prompt, row), _fill(task.answer, row)
    spans = [
        (start + offset, end + offset, name)
        for template, offset in ((task.prompt, 0), (task.answer, len(prompt)))
        for start, end, name in (_spans(template, row.fields, classes) if classes else ())
    ]
    if task.choices and answer not in task.choices:
        raise DataError(f"{row.place}: the answer {answer!r} is no choice", remedy="list it in task.choices")
    end = len(prompt) - len(task.gap) if task.choices else _end(prompt)
    return Example(prompt[:end], prompt[end:] + answer, tuple(spans))


def _end(prompt: str) -> int:
    """Where a prompt ends: spaces behind its last character are read with the answer, as ``TaskSection.gap`` says."""
    return len(prompt.rstrip(" ")) or len(prompt)


def _spans(template: str, fields: dict[str, Any], classes: Mapping[str, str]) -> Iterator[FieldSpan]:
    """Places, in the filled template, of the fields that have a class. ``_fill`` has accepted the row before."""
    start = 0
    for literal, name, form, conversion in Formatter().parse(template):
        start += len(literal)
        if name is None:
            continue
        value = f"{{{name}{'!' + conversion if conversion else ''}:{form}}}".format_map(fields)
        field = re.split(r"[.\[]", name)[0]
        if field in classes and value:
            yield start, start + len(value), classes[field]
        start += len(value)


def _fill(template: str, row: SourceRow) -> str:
    """The template with the row's fields: each must be text, a number or a truth value, and not be empty."""
    try:
        text = template.format_map(row.fields)
        used = [(name, Formatter().get_field(name, (), row.fields)[0]) for name in _names(template)]
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{row.place} does not fill the template {template!r}: {error}", remedy="correct the row or the template"
        ) from error
    for name, value in used:
        _check_text(row.place, template, name, value)
    return text


def _names(template: str) -> list[str]:
    """Names of the fields that a template uses, with their parts: ``text`` or ``text[en]``."""
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def _check_text(place: str, template: str, name: str, value: Any) -> None:
    """Refuse a value that Python would write as a word that nobody wrote: None, nan, or the brackets of a list."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip() or value in ([], {}):
        raise DataError(f"{place} has no text in {name!r}", remedy="fill the field or drop the row")
    if not isinstance(value, str | int | float | Decimal | date):
        raise DataError(
            f"{place} does not fill the template {template!r}: {name!r} is a {type(value).__name__}, not a text",
            remedy="name a part of it in the template, such as {field[0]} or {field[key]}, or write it as text",
        )
