"""Items as a task of lm-eval's harness, so that its score can be set beside ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from isthmus.tasks.metrics import measure
from isthmus.tasks.task import Item, Ranking, Task

HARNESS_MEASURES: dict[Ranking, str] = {"total": "acc", "length": "acc_norm", "unconditioned": "acc_mutual_info"}
"""lm-eval's accuracy by each ranking."""
RESULTS = '''"""Measures written answers as isthmus does."""

from isthmus.tasks.harness import answered_by


def results(doc, given):
    return answered_by(doc, given[0])
'''


def write_harness_task(task: Task, items: Sequence[Item], folder: Path, *, max_items: int | None = None) -> str:
    """Write a task file, and the items as its data, for ``lm_eval --include_path FOLDER --tasks NAME``.

    Of choices the harness gives the accuracy by the task's ranking; of written answers the task's own measures.

    Args:
        folder: created if absent.
        max_items: most items, the first; None: all.

    Returns:
        The task's name there, ``isthmus_`` and its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, data = f"isthmus_{task.name}", folder.resolve() / f"isthmus_{task.name}.jsonl"
    chosen = items[:max_items]
    data.write_text("".join(f"{json.dumps(_document(task, item))}\n" for item in chosen), encoding="utf-8")
    body: dict[str, object] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "prompt",
        "target_delimiter": "",
    }
    if task.longest:
        (folder / "isthmus_results.py").write_text(RESULTS, encoding="utf-8")
        body |= {
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": list(task.stop), "max_gen_toks": task.longest, "do_sample": False},
            "metric_list": [{"metric": one, "aggregation": "mean", "higher_is_better": True} for one in task.metrics],
        }
    else:
        body |= {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "number",
            "metric_list": [{"metric": HARNESS_MEASURES[task.ranking]}],
        }
    lines = [f"{key}: {json.dumps(value)}" for key, value in body.items()]
    if task.longest:
        lines.append("process_results: !function isthmus_results.results")
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def answered_by(doc: dict[str, object], given: str) -> dict[str, float]:
    """The measures of one document of a written task."""
    right = doc["right"]
    assert isinstance(right, list)
    item = Item(str(doc["prompt"]), str(doc["answer"]), tuple(right))
    measures = doc["metrics"]
    assert isinstance(measures, list)
    return {name: score.value for name, score in measure(measures, [(item, given.strip())]).items()}


def _document(task: Task, item: Item) -> dict[str, object]:
    document: dict[str, object] = {"prompt": item.prompt, "answer": item.answer}
    if task.longest:
        return document | {"right": list(item.right), "metrics": list(task.metrics)}
    right = [number for number, name in enumerate(item.names) if name in item.right]
    return document | {"choices": list(item.choices), "number": right if len(right) > 1 else right[0]}
