"""SuperGLUE's rows, of either form, as the cloze questions of the paper."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.errors import DataError
from isthmus.tasks import superglue
from isthmus.tasks.task import Item

YES_NO = (" no", " yes")


def only(items: list[Item]) -> Item:
    (item,) = items
    assert item.answer in item.choices
    assert len(item.choices) == len(item.names)
    return item


@pytest.mark.parametrize("label", [True, 1, "true"])
def test_boolq(label: Any) -> None:
    item = only(superglue.boolq({"passage": "Cats purr. ", "question": "do cats purr", "label": label}))
    assert item.prompt == "Cats purr.\nQuestion: do cats purr?\nAnswer:"
    assert (item.answer, item.choices) == (" yes", YES_NO)


@pytest.mark.parametrize(("label", "word"), [("entailment", "yes"), (0, "yes"), ("not_entailment", "no"), (1, "no")])
def test_rte(label: Any, word: str) -> None:
    item = only(superglue.rte({"premise": "It rained.", "hypothesis": "It was wet.", "label": label}))
    assert item.prompt == "It was wet?"
    assert item.choices == (" yes, It rained.", " no, It rained.")
    assert item.answer == f" {word}, It rained."


@pytest.mark.parametrize(("label", "word"), [(0, "yes"), (1, "no"), (2, "maybe"), ("neutral", "maybe")])
def test_cb(label: Any, word: str) -> None:
    item = only(superglue.cb({"premise": "P.", "hypothesis": "H", "label": label}))
    assert item.prompt == "H?"
    assert item.choices == (" yes, P.", " no, P.", " maybe, P.")
    assert item.answer == f" {word}, P."


@pytest.mark.parametrize(("question", "joint"), [("cause", "because"), ("effect", "so")])
def test_copa(question: str, joint: str) -> None:
    row = {"premise": "The cup fell.", "choice1": "It broke.", "choice2": "Anna slept.", "question": question}
    item = only(superglue.copa({**row, "label": 1}))
    assert item.prompt == f'"It broke" or "Anna slept"? The cup fell, {joint}'
    assert item.choices == (" it broke.", " anna slept.")
    assert item.answer == " anna slept."


def test_copa_that_asks_for_something_else() -> None:
    row = {"premise": "P", "choice1": "A", "choice2": "B", "question": "reason", "label": 0}
    with pytest.raises(DataError, match="'reason'"):
        superglue.copa(row)


def test_multirc_of_both_forms() -> None:
    flat = {
        "paragraph": "P.",
        "question": "Who?",
        "answer": "Ann.",
        "label": 1,
        "idx": {"paragraph": 3, "question": 5, "answer": 7},
    }
    answers = [{"text": "Ann.", "label": 1}, {"text": "Bob", "label": 0}]
    nested = {"idx": 3, "passage": {"text": "P.", "questions": [{"question": "Who?", "idx": 5, "answers": answers}]}}
    first, second = superglue.multirc(nested)
    assert only(superglue.multirc(flat)) == first
    assert first.prompt == "P.\nQuestion: Who?\nIs it Ann?"
    assert (first.answer, second.answer) == (" yes", " no")
    assert first.group == second.group == "3/5"


def test_record_of_both_forms() -> None:
    text = "Ann met Bob.\n@highlight\nAnn won"
    flat = {
        "passage": text,
        "query": "In the end @placeholder's rival lost.",
        "entities": ["Bob", "Ann", "Bob"],
        "answers": ["Ann"],
    }
    places = [{"start": 8, "end": 10}, {"start": 0, "end": 2}, {"start": 24, "end": 26}]
    query = {"query": flat["query"], "answers": [{"text": "Ann", "start": 0, "end": 2}]}
    nested = {"passage": {"text": text, "entities": places}, "qas": [query]}
    item = only(superglue.record(flat))
    assert only(superglue.record(nested)) == item
    assert item.prompt == "Ann met Bob.\n- Ann won\nIn the end"
    assert item.choices == (" Ann's rival lost.", " Bob's rival lost.")
    assert (item.names, item.right, item.answer) == (("Ann", "Bob"), ("Ann",), " Ann's rival lost.")


@pytest.mark.parametrize(
    ("query", "prompt", "choice"), [("@placeholder won", "P\n", "Ann won"), ("'@placeholder'", "P\n'", "Ann'")]
)
def test_record_keeps_what_stands_around_the_blank(query: str, prompt: str, choice: str) -> None:
    item = only(superglue.record({"passage": "P", "query": query, "entities": ["Ann"], "answers": ["Ann"]}))
    assert (item.prompt, item.choices) == (prompt, (choice,))


@pytest.mark.parametrize(("query", "right"), [("no blank", "Ann"), ("@placeholder won", "Zoe")])
def test_record_without_blank_or_answer(query: str, right: str) -> None:
    with pytest.raises(DataError, match="@placeholder"):
        superglue.record({"passage": "P", "query": query, "entities": ["Ann"], "answers": [right]})


def test_wic() -> None:
    row = {"word": "bed", "sentence1": "A river bed.", "sentence2": "To bed.", "label": False}
    item = only(superglue.wic(row))
    assert item.prompt == '"A river bed." / "To bed." Similar sense of "bed"?'
    assert (item.answer, item.choices) == (" no", YES_NO)


def test_wsc_of_both_forms() -> None:
    target = {"span1_text": "The cup", "span2_text": "it", "span1_index": 0, "span2_index": 3}
    nested = {"text": "The cup fell; it broke.", "target": target, "label": True}
    flat = {"text": nested["text"], "label": 1, **target}
    item = only(superglue.wsc(nested))
    assert only(superglue.wsc(flat)) == item
    assert item.prompt == 'The cup fell; *it* broke. The pronoun "*it*" refers to "The cup"?'
    assert item.answer == " yes"


@pytest.mark.parametrize("task", superglue.SUPERGLUE, ids=lambda task: task.name)
def test_a_row_of_something_else_is_refused(task: Any) -> None:
    for row in ({}, {"text": "t"}, {"passage": None}, {"premise": "p", "hypothesis": "h", "label": -1}):
        with pytest.raises(DataError):
            task.items(row)
