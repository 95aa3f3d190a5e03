"""Data rows as prompts and answers: the recipe's templates, filled with a row's fields."""

from __future__ import annotations

import math
import re
from _string import formatter_field_name_split  # type: ignore[import-not-found]
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from string import Formatter
from typing import Any

from isthmus.data.sources import SourceRow
from isthmus.errors import DataError
from isthmus.recipe import TaskSection
from isthmus.tasks.task import Item

FieldSpan = tuple[int, int, str]
"""First character, character after the last, and sensitivity class of a part of a text."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one party of a conversation says."""

    role: str
    """``system``, ``user``, ``assistant``, or another one that the model's chat template knows."""
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row as text for the model."""

    prompt: str
    answer: str
    spans: tuple[FieldSpan, ...] = ()
    """Places, in prompt + answer, of the fields that have a sensitivity class."""
    turns: tuple[Turn, ...] = ()
    """The conversation before the answer, for the model's chat template; ``prompt`` is then its turns, one a line.
    Empty: plain text."""
    conversation: str = ""
    """What the examples of one row, such as the turns of a conversation, have in common; empty: it stands alone."""
    whole: bool = False
    """Whether the answer is all of a text that has no prompt."""
    item: Item | None = None
    """The question of a known task; None: the recipe's own templates."""

    @property
    def choices(self) -> tuple[str, ...]:
        """The possible answers, where the example has its own; in a conversation without the space before a word."""
        own = () if self.item is None else self.item.choices
        return tuple(one.strip() for one in own) if self.turns else own

    def answered(self, answer: str) -> Example:
        """The example with another answer, all of which has the classes of this one's fields."""
        start = len(self.prompt)
        spans = [span if span[0] < start else (start, start + len(answer), span[2]) for span in self.spans]
        return replace(self, answer=answer, spans=tuple(spans))


Placed = tuple[str, Example]
"""A row's place, as ``file:line``, and its text."""


def fill_templates(row: SourceRow, task: TaskSection, classes: Mapping[str, str]) -> Example:
    """The task's prompt and answer for one row, or its text.

    Args:
        classes: sensitivity class by field name.

    Raises:
        DataError: the row lacks text for a field of the templates, or its answer is none of the task's choices.
    """
    if task.text:
        text, spans = _filled(task.text, row, task, classes)
        return Example("", text, spans, whole=True)
    asked, (answer, more) = fill_prompt(row, task, classes), _filled(task.answer, row, task, classes)
    if task.choices and answer not in task.choices:
        raise no_choice(answer, task.choices, row.place)
    start = len(asked.prompt) + len(asked.answer)
    moved = [(one + start, two + start, name) for one, two, name in more]
    return replace(asked, answer=asked.answer + answer, spans=(*asked.spans, *moved))


def no_choice(answer: str, choices: Sequence[str], place: str = "") -> DataError:
    """The error of an answer that is none of the choices.

    Args:
        place: of its row.
    """
    where = f"{place}: " if place else ""
    return DataError(f"{where}the answer {answer!r} is no choice", remedy=_choice_remedy(answer, choices))


def _choice_remedy(answer: str, choices: Sequence[str]) -> str:
    """What such an answer most likely lacks: spaces, or the same letters as a choice."""
    plain = answer.strip().casefold()
    near = next((one for one in choices if one.strip().casefold() == plain), None)
    if near is None:
        return "list it in task.choices"
    if near.strip() != answer.strip():
        return f"write it as the choice {near!r}: capital letters count"
    if near.lstrip() != near and answer.lstrip() == answer:
        return f"the choice {near!r} begins with a space: begin task.answer with one, or leave it out of task.choices"
    return f"write it as the choice {near!r}: spaces count"


def fill_prompt(row: SourceRow, task: TaskSection, classes: Mapping[str, str]) -> Example:
    """The task's prompt for one row. The answer is empty, but for spaces that are read with it.

    Args:
        classes: as in ``fill_templates``.

    Raises:
        DataError: the row lacks text for a field of the prompt's template.
    """
    prompt, spans = _filled(task.prompt, row, task, classes)
    if task.chat:
        system = [Turn("system", task.system)] if task.system else []
        return chat_example([*system, Turn("user", prompt)], spans, len(task.system) + 1 if task.system else 0)
    end = len(prompt) - len(task.gap) if task.choices else _end(prompt)
    return Example(prompt[:end], prompt[end:], spans)


def chat_example(turns: Sequence[Turn], spans: Sequence[FieldSpan] = (), shift: int = 0) -> Example:
    """The example of a conversation that waits for its answer.

    Args:
        spans: places with a sensitivity class, from character ``shift`` of the turns, which stand one a line.
    """
    moved = tuple((start + shift, end + shift, name) for start, end, name in spans)
    return Example("\n".join(turn.content for turn in turns), "", moved, tuple(turns))


def check_message(place: str, name: str, value: object) -> str:
    """A value that must be a text, and not an empty one.

    Raises:
        DataError: it is anything else, such as null.
    """
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place} has no text in {name!r}", remedy="fill the field or drop the row")
    return value


def _end(prompt: str) -> int:
    """Where a prompt ends: spaces behind its last character are read with the answer, as ``TaskSection.gap`` says."""
    return len(prompt.rstrip(" ")) or len(prompt)


def _filled(
    template: str, row: SourceRow, task: TaskSection, classes: Mapping[str, str]
) -> tuple[str, tuple[FieldSpan, ...]]:
    """The template with the row's fields, and the places of those that have a class. Each must be text, a number or a
    truth value, and not be empty."""
    filler = _Filler(row.place, template, task.join)
    try:
        text = filler.vformat(template, (), row.fields)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{row.place} does not fill the template {template!r}: {error}", remedy="correct the row or the template"
        ) from error
    return text, tuple(_spans(template, row.fields, classes, filler) if classes else ())


def _spans(
    template: str, fields: Mapping[str, Any], classes: Mapping[str, str], filler: Formatter
) -> Iterator[FieldSpan]:
    """Places, in the filled template, of the fields that have a class. The filler has accepted the row before."""
    start = 0
    for literal, name, form, conversion in Formatter().parse(template):
        start += len(literal)
        if name is None:
            continue
        value = filler.vformat(f"{{{name}{'!' + conversion if conversion else ''}:{form}}}", (), fields)
        field = re.split(r"[.\[]", name)[0]
        if field in classes and value:
            yield start, start + len(value), classes[field]
        start += len(value)


class _Filler(Formatter):
    """Fills a template with fields: parts of objects and lists by ``{field.part}`` or ``{field[part]}``, whole lists
    of texts with ``join`` between them. Attributes of Python's own are out of reach."""

    def __init__(self, place: str, template: str, join: str | None) -> None:
        self._place, self._template, self._join = place, template, join

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        """The value that a name in a template stands for."""
        first, rest = formatter_field_name_split(field_name)
        value = self.get_value(first, args, kwargs)
        for named, part in rest:
            value = _part(value, part, named)
        return self._checked(field_name, value), str(first)

    def _checked(self, name: str, value: Any) -> Any:
        if isinstance(value, list | tuple) and self._join is not None and value:
            for one in value:
                _check_text(self._place, self._template, name, one)
            return self._join.join(map(str, value))
        _check_text(self._place, self._template, name, value)
        return value


def _part(value: Any, part: str | int, named: bool) -> Any:
    """A part of an object or a list.

    Args:
        named: whether the template writes it with a dot.
    """
    if isinstance(value, Mapping):
        return value[part if part in value else str(part)]
    if named or not isinstance(value, Sequence) or isinstance(part, str):
        raise TypeError(f"{type(value).__name__} has no part {part!r}")
    return value[part]


def _check_text(place: str, template: str, name: str, value: Any) -> None:
    """Refuse a value that Python would write as a word that nobody wrote: None, nan, or the brackets of a list."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip() or value in ([], {}):
        raise DataError(f"{place} has no text in {name!r}", remedy="fill the field or drop the row")
    if not isinstance(value, str | int | float | Decimal | date):
        raise DataError(
            f"{place} does not fill the template {template!r}: {name!r} is a {type(value).__name__}, not a text",
            remedy="name a part of it in the template, such as {field[0]} or {field.key}, or join a list's texts by "
            "task.join",
        )
