"""What fields suggest is what the recipe then reads: each proposal makes the rows' prompts and answers."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.data.conversations import row_examples
from isthmus.data.proposal import MOST_CLASSES, TaskProposal, propose_task
from isthmus.data.sources import SourceRow
from isthmus.errors import DataError
from isthmus.recipe import TaskSection


def rows(*fields: dict[str, Any]) -> list[SourceRow]:
    return [SourceRow(f"rows.csv:{number}", one) for number, one in enumerate(fields, 2)]


def read(proposal: TaskProposal, row: SourceRow) -> tuple[str, str]:
    """Prompt and answer of a row under this proposal."""
    task = TaskSection(**proposal.task)
    ((_, example),) = row_examples(row, task, {one.strip(): one for one in task.choices})
    return example.prompt, example.answer


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "2 + 2 =", "answer": " 4"}, "2 + 2 =", " 4"),
        ({"prompt": "2 + 2 =", "completion": " 4", "id": 1}, "2 + 2 =", " 4"),
        ({"question": "Who?", "answer": "I", "extra": None}, "Who?\nAnswer:", " I"),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "Add.\n1, 2\nOutput:", " 3"),
        ({"instruction": "Add.", "response": "3"}, "Add.\nResponse:", " 3"),
        ({"document": "A long one.", "summary": "One.", "id": "7"}, "A long one.\nSummary:", " One."),
    ],
)
def test_fields_that_everybody_uses_are_known(row: dict[str, Any], prompt: str, answer: str) -> None:
    some = rows(row)
    assert read(propose_task(some), some[0]) == (prompt, answer)


@pytest.mark.parametrize("fields", [["messages"], ["prompt", "completion"]])
def test_conversations_are_known(fields: list[str]) -> None:
    turns = [{"role": "user", "content": "Hello."}]
    assert propose_task(rows(dict.fromkeys(fields, turns))).task == {"messages": fields}


def test_one_text_alone_is_plain_text() -> None:
    assert propose_task(rows({"body": "A note.", "scores": [1, 2]})).task == {"text": "{body}"}


def test_few_short_values_are_classes() -> None:
    some = rows(
        *({"key": number, "mail": f"mail number {number}", "kind_of": f"k{number % 3}"} for number in range(12))
    )
    proposal = propose_task(some)
    assert read(proposal, some[1]) == ("mail number 1\nKind of:", " k1")
    assert proposal.task["choices"] == [" k0", " k1", " k2"]
    assert "3 classes in kind_of" in proposal.why


def test_a_field_named_label_is_the_class_even_if_another_has_fewer_values() -> None:
    some = rows(*({"text": f"text {n}", "site": f"s{n % 2}", "Label": f"c{n % 3}"} for n in range(12)))
    assert propose_task(some).task["answer"] == " {Label}"


@pytest.mark.parametrize(
    "fields",
    [
        [{"a": f"first {n}", "b": f"second {n}"} for n in range(12)],
        [{"a": f"first {n}", "label": f"c{n}"} for n in range(2 * MOST_CLASSES + 4)],
        [{"a": f"first {n}", "label": "one"} for n in range(8)],
        [{"a": f"first {n}", "label": "" if n % 2 else "x"} for n in range(8)],
        [{"a": "only here"}, {"b": "only there"}],
        [{}],
    ],
)
def test_fields_that_tell_nothing_are_named(fields: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r"rows\.csv:2: the fields") as caught:
        propose_task(rows(*fields))
    assert "--prompt" in caught.value.remedy
