"""One silo's split model, taught a task through a point's own boundary: noise and narrowness are met in training, too.

The silo that colludes trains, so none of the victim's rows is trained on. Runs stay in ``build/frontier``: what is
there is not trained again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.privacy.points import Point
from benchmarks.privacy.tasks import CACHE, LORA, Task
from isthmus.audit.target import Target
from isthmus.engines.local import create_run, run_federation
from isthmus.storage.record import RunDirectory

TEACHER = "west"


def learned(task: Task, base: Path, point: Point, name: str | None = None) -> Target:
    """Both silos' recipe with what the one has learned.

    Args:
        point: its noise must not depend on what crosses.
        name: of the run; left out, the point's.
    """
    recipe = replace(task, steps=point.learned).recipe(base, point.cut, point.fixed(), LORA)
    path = CACHE / "runs" / task.name / (name or point.name)
    alone = recipe.model_copy(update={"silo": (recipe.party(TEACHER),), "threads": 1})
    run = RunDirectory.open(path) if path.exists() else create_run(alone, path)
    if run.completed() < alone.train.rounds:
        run_federation(run)
    return Target(recipe, run)
