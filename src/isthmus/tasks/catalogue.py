"""All known tasks, by name."""

from __future__ import annotations

from collections.abc import Mapping

from isthmus.errors import RecipeError
from isthmus.tasks.classification import CLASSIFICATION
from isthmus.tasks.superglue import SUPERGLUE
from isthmus.tasks.task import Task
from isthmus.tasks.writing import WRITING

TASKS: Mapping[str, Task] = {task.name: task for task in (*SUPERGLUE, *WRITING, *CLASSIFICATION)}


def named_task(name: str) -> Task:
    """The task of this name.

    Raises:
        RecipeError: there is none.
    """
    if name not in TASKS:
        raise RecipeError(f"there is no task {name!r}", remedy=f"name one of {', '.join(sorted(TASKS))}")
    return TASKS[name]
