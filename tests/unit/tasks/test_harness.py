"""Tasks as files for lm-eval's harness: what is in them. That their scores are equal is an oracle's test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from isthmus.tasks.catalogue import named_task
from isthmus.tasks.harness import answered_by, write_harness_task
from isthmus.tasks.task import Item, Ranking, Task


def documents(folder: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("ranking", "measure"), [("total", "acc"), ("length", "acc_norm"), ("unconditioned", "acc_mutual_info")]
)
def test_choices_and_their_ranking(ranking: Ranking, measure: str, tmp_path: Path) -> None:
    one = Item("Q é{{x}}", " b", ("b",), (" a", " b"), ("a", "b"))
    both = Item("R", " a", ("a", "b"), (" a", " b", " c"), ("a", "b", "c"))
    task = Task("mine", lambda _: [one, both], ("accuracy",), ranking)
    assert write_harness_task(task, task.items({}), tmp_path / "new") == "isthmus_mine"
    body = yaml.safe_load((tmp_path / "new" / "isthmus_mine.yaml").read_text())
    assert body["output_type"] == "multiple_choice"
    assert body["metric_list"] == [{"metric": measure}]
    first, second = documents(tmp_path / "new", "isthmus_mine")
    assert (first["prompt"], first["choices"], first["number"]) == ("Q é{{x}}", [" a", " b"], 1)
    assert second["number"] == [0, 1]


def test_written_answers_are_measured_as_here(tmp_path: Path) -> None:
    task = named_task("canard")
    row = {"title": "T", "question": "Who?", "answer": "the Cat"}
    name = write_harness_task(task, task.items(row) * 3, tmp_path, max_items=2)
    text = (tmp_path / f"{name}.yaml").read_text()
    assert "process_results: !function isthmus_results.results" in text
    assert (tmp_path / "isthmus_results.py").exists()
    first, _ = documents(tmp_path, name)
    assert answered_by(first, " a cat") == {"token_f1": 1.0, "exact_match": 1.0}
