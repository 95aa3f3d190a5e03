"""All tasks by name, on every row of the real sets where these are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import RecipeError
from isthmus.tasks.catalogue import TASKS, named_task
from isthmus.tasks.metrics import METRICS

DATA = Path(__file__).parents[4] / "shared" / "data"
FOLDERS = {
    **{name: f"superglue_{name}" for name in ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")},
    "scitldr": "scitldr_a",
    "pubmedqa": "pubmedqa_labeled",
    "sentiment": "hutto_sentiment",
}


def rows(name: str) -> Iterator[dict[str, Any]]:
    folder = DATA / FOLDERS.get(name, name)
    if not folder.is_dir():
        pytest.skip(f"needs {folder.name}")
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            row = json.loads(line) if line else {}
            if row and (name != "canard" or "answer" in row):
                yield row


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"coqa"}))
def test_every_real_row_has_items(name: str) -> None:
    task, count = named_task(name), 0
    for row in rows(name):
        if name == "sentiment" and not row["score"]:
            continue
        for item in task.items(row):
            count += 1
            assert item.prompt.strip()
            assert item.answer.strip()
            assert bool(item.choices) == (not task.longest)
            assert item.answer in item.choices or not item.choices
            assert "@placeholder" not in item.prompt + item.answer
    assert count


def test_every_task_names_measures_that_there_are() -> None:
    assert {metric for task in TASKS.values() for metric in task.metrics} <= set(METRICS)
    assert all(task.metrics for task in TASKS.values())


def test_another_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(RecipeError, match="'rtee'") as caught:
        named_task("rtee")
    assert "rte" in str(caught.value.remedy)


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"coqa"}))
def test_a_row_is_asked_without_its_answer(name: str) -> None:
    """The questions are those of the row with its answer: with whatever label, or none where one stands beside."""
    task = named_task(name)
    for row in islice((one for one in rows(name) if name != "sentiment" or one["score"]), 50):
        expected = [(item.prompt, item.choices, item.names) for item in task.items(row)]
        hidden = {key: value for key, value in row.items() if key not in task.stand_in(row)}
        for known in (row, {**hidden, "label": -1}, hidden):
            if "label" not in task.stand_in(row) and known is not row and "label" in known:
                continue
            assert [(item.prompt, item.choices, item.names) for item in task.asked(known)] == expected
