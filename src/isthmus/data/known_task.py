"""Rows of a known task (``task.name``) as prompts and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from isthmus.data.sources import SourceRow
from isthmus.data.templates import Example, Turn, chat_example
from isthmus.errors import DataError, RecipeError
from isthmus.recipe import TaskSection
from isthmus.tasks.catalogue import named_task
from isthmus.tasks.task import Item


def task_examples(row: SourceRow, task: TaskSection, classes: Mapping[str, str]) -> list[tuple[str, Example]]:
    """The examples of one row, each with its place: one for each question of the row.

    Args:
        classes: must be empty, since a known task has no templates with fields.

    Raises:
        DataError: the row lacks what the task needs.
        RecipeError: there is no such task, or fields have sensitivity classes.
    """
    if classes:
        raise RecipeError(
            f"sensitivity.fields names fields, but the task {task.name!r} has no templates",
            remedy="use sensitivity.detectors, or write the task's templates yourself in place of task.name",
        )
    try:
        items = named_task(task.name or "").items(row.fields)
    except DataError as error:
        raise DataError(f"{row.place}: {error.message}", remedy=error.remedy) from error
    if len(items) == 1:
        return [(row.place, _example(items[0], task))]
    return [  # one record: each question tells of the same text
        (f"{row.place}, question {number}", replace(_example(item, task), conversation=row.place))
        for number, item in enumerate(items, 1)
    ]


def asked_questions(row: SourceRow, task: TaskSection) -> list[tuple[str, Example]]:
    """The examples of one row whose answer is not known: prompts and choices of ``task_examples``.

    Raises:
        DataError: the row lacks what the task needs; some forms of rows cannot be without their answers.
        RecipeError: there is no such task.
    """
    try:
        items = named_task(task.name or "").asked(row.fields)
    except DataError as error:
        raise DataError(f"{row.place}: {error.message}", remedy=error.remedy) from error
    examples = [replace(_example(item, task), answer="", conversation=row.place) for item in items]
    several = len(examples) > 1
    return [(f"{row.place}, question {n}" if several else row.place, one) for n, one in enumerate(examples, 1)]


def _example(item: Item, task: TaskSection) -> Example:
    if not task.chat:
        return Example(item.prompt, item.answer, item=item)
    system = [Turn("system", task.system)] if task.system else []
    asked = chat_example([*system, Turn("user", item.prompt)])
    return replace(asked, answer=item.answer.strip(), item=item)
