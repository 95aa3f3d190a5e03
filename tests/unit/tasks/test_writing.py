"""Summaries and answers in conversations."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.errors import DataError
from isthmus.tasks import writing


def test_summaries_have_their_source_and_an_instruction() -> None:
    (one,) = writing.xsum({"document": " D ", "summary": "S"})
    assert one.prompt == "Summarize the following article in one sentence.\n\nD\n\nSummary:"
    assert (one.answer, one.right, one.choices) == (" S", ("S",), ())
    assert writing.cnn_dailymail({"article": "D", "highlights": "S"}) == writing.cnn_dailymail(
        {"document": "D", "summary": "S"}
    )


def test_a_paper_has_many_right_summaries() -> None:
    (one,) = writing.scitldr({"source": ["A.", " B."], "target": ["S", "T "]})
    assert "\n\nA. B.\n\n" in one.prompt
    assert (one.answer, one.right) == (" S", ("S", "T"))


def test_a_section_of_a_note() -> None:
    (one,) = writing.mts_dialog({"dialogue": "Doctor: Hi", "section_header": "GENHX", "section_text": "Well."})
    assert "section GENHX" in one.prompt
    assert one.prompt.endswith("Doctor: Hi\n\nNote:")
    assert one.answer == " Well."


COQA: list[dict[str, Any]] = [
    {"questions": ["Who?", "When?"], "answers": ["Ann", "now"]},
    {"questions": ["Who?", "When?"], "answers": {"input_text": ["Ann", "now"], "answer_start": [0, 1]}},
    {
        "questions": [{"input_text": "Who?"}, {"input_text": "When?"}],
        "answers": [{"input_text": "Ann"}, {"input_text": "now"}],
    },
]


@pytest.mark.parametrize("row", COQA)
def test_each_turn_of_a_conversation_follows_those_before(row: dict[str, Any]) -> None:
    first, second = writing.coqa({"story": "S.", **row})
    assert first.prompt == "Answer the question about the story.\n\nS.\n\nQ: Who?\nA:"
    assert second.prompt == "Answer the question about the story.\n\nS.\n\nQ: Who?\nA: Ann\nQ: When?\nA:"
    assert (first.answer, second.answer) == (" Ann", " now")


def test_further_answers_are_right_too() -> None:
    more = {"0": [{"input_text": "Anna"}, {"input_text": "now"}], "1": [{"input_text": "too few"}]}
    first, second = writing.coqa({"story": "S.", **COQA[0], "additional_answers": more})
    assert (first.right, second.right) == (("Ann", "Anna"), ("now",))


@pytest.mark.parametrize(
    "row",
    [
        {"questions": ["Who?"], "answers": ["a", "b"]},
        {"questions": ["Who?"], "answers": [None]},
        {"questions": [], "answers": []},
    ],
)
def test_a_conversation_with_holes_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        writing.coqa({"story": "S.", **row})


def test_a_conversation_without_a_story() -> None:
    row = {"title": "Zappa", "section": "Band", "history": ["Who?", "Ann"], "question": "When?", "answer": "Now"}
    (one,) = writing.canard(row)
    assert one.prompt == "Answer the question in a conversation about Zappa, Band.\n\nQ: Who?\nA: Ann\nQ: When?\nA:"
    assert one.right == ("Now",)
    (begun,) = writing.canard({**row, "history": [], "section": None})
    assert begun.prompt == "Answer the question in a conversation about Zappa.\n\nQ: When?\nA:"


@pytest.mark.parametrize("task", writing.WRITING, ids=lambda task: task.name)
def test_a_row_of_something_else_is_refused(task: Any) -> None:
    assert task.longest > 0
    for row in ({}, {"text": "t"}, {"document": None, "story": 3}):
        with pytest.raises(DataError):
            task.items(row)
