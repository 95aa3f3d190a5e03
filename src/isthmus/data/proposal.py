"""How rows of a user's own may become prompts and answers: the ``[task]`` that their fields suggest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.data.sources import SourceRow
from isthmus.errors import DataError

LABELS = ("label", "class", "category", "intent", "sentiment", "topic", "target")
"""Names of a field of classes, the likeliest first."""
PAIRS = (("question", "answer"), ("instruction", "output"), ("instruction", "response"), ("document", "summary"))
"""Fields of a prompt and of its answer."""
MOST_CLASSES, LONGEST_CLASS = 50, 40
"""A field with more values, or longer ones, is no class."""


@dataclass(frozen=True)
class TaskProposal:
    """How rows may be read."""

    why: str
    """What was seen, in words."""
    task: Mapping[str, Any] = field(default_factory=dict)
    """Keys of ``[task]``; none: the defaults do."""


def propose_task(rows: Sequence[SourceRow]) -> TaskProposal:
    """The proposal that the fields of these rows suggest: by their names, else by a field of few short values.

    Raises:
        DataError: they suggest none.
    """
    fields = [name for name in rows[0].fields if all(name in row.fields for row in rows)]
    lists = [name for name in fields if all(isinstance(row.fields[name], list) for row in rows)]
    texts = [name for name in fields if all(_is_text(row.fields[name]) for row in rows)]
    if {"prompt", "answer"} <= set(texts):
        return TaskProposal("rows with prompt and answer")
    if "messages" in lists:
        return TaskProposal("conversations in messages", {"messages": ["messages"]})
    if {"prompt", "completion"} <= set(lists):
        return TaskProposal("conversations in prompt and completion", {"messages": ["prompt", "completion"]})
    if {"prompt", "completion"} <= set(texts):
        return TaskProposal("rows with prompt and completion", {"prompt": "{prompt}", "answer": "{completion}"})
    for prompt, answer in PAIRS:
        if {prompt, answer} <= set(texts):
            more = "\n{input}" if "input" in texts else ""
            keys = {"prompt": f"{{{prompt}}}{more}\n{answer.capitalize()}:", "answer": f" {{{answer}}}"}
            return TaskProposal(f"rows with {prompt} and {answer}", keys)
    if len(texts) == 1:
        return TaskProposal(f"plain text in {texts[0]}", {"text": f"{{{texts[0]}}}"})
    return _classes(rows, texts)


def _classes(rows: Sequence[SourceRow], texts: Sequence[str]) -> TaskProposal:
    """Of the longest texts and a field with few values."""
    values = {name: sorted({str(row.fields[name]).strip() for row in rows}) for name in texts}
    few = [name for name in texts if _are_classes(values[name], len(rows))]
    named = [name for label in LABELS for name in few if name.lower() == label]
    label = next(iter(named or sorted(few, key=lambda name: len(values[name]))), None)
    if label is None or len(texts) < 2:
        found = ", ".join(map(str, rows[0].fields)) or "none"
        raise DataError(
            f"{rows[0].place}: the fields ({found}) do not tell what is asked and what is answered",
            remedy="say it with --prompt and --answer, as --prompt '{text}' --answer ' {label}'",
        )
    others = [name for name in texts if name != label]
    text = max(others, key=lambda name: sum(len(str(row.fields[name])) for row in rows))
    keys = {
        "prompt": f"{{{text}}}\n{label.replace('_', ' ').capitalize()}:",
        "answer": f" {{{label}}}",
        "choices": [f" {one}" for one in values[label]],
    }
    return TaskProposal(f"texts in {text}, and {len(values[label])} classes in {label}", keys)


def _are_classes(values: Sequence[str], rows: int) -> bool:
    return 2 <= len(values) <= min(MOST_CLASSES, rows // 2) and max(map(len, values)) <= LONGEST_CLASS and all(values)


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)
