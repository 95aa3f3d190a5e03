"""Sensitive fields beside the task's templates."""

from __future__ import annotations

from isthmus.recipe.sections import SensitivitySection, TaskSection


def check_fields(sensitivity: SensitivitySection | None, task: TaskSection) -> None:
    """Refuse sensitive fields that no template uses."""
    for field in sensitivity.fields if sensitivity else ():
        if field not in task.fields:
            used = ", ".join(sorted(task.fields)) or "none"
            raise ValueError(f"sensitivity.fields: no template has {field!r}; use one of: {used}")
