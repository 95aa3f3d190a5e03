"""Sentiment, and questions about papers."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.errors import DataError
from isthmus.tasks.classification import CLASSIFICATION, pubmedqa, sentiment


@pytest.mark.parametrize(
    "mood", [{"label": "positive"}, {"label": 1}, {"score": 0.7}, {"label": "positive", "score": -1}]
)
def test_sentiment_by_label_or_score(mood: dict[str, Any]) -> None:
    (item,) = sentiment({"text": "Fine.", **mood})
    assert item.prompt == "Fine.\nSentiment (positive or negative):"
    assert (item.answer, item.choices) == (" positive", (" negative", " positive"))


def test_a_question_about_a_paper() -> None:
    row = {"question": "Does it?", "contexts": ["A.", "B."], "final_decision": "maybe"}
    (item,) = pubmedqa(row)
    assert item.prompt == "A.\nB.\nQuestion: Does it?\nAnswer (yes, no or maybe):"
    assert item.answer == " maybe"
    assert pubmedqa({**row, "contexts": ["A.", "B."]}) == pubmedqa(
        {"question": "Does it?", "context": {"contexts": ["A.", "B."]}, "label": 2}
    )


@pytest.mark.parametrize("task", CLASSIFICATION, ids=lambda task: task.name)
def test_a_row_of_something_else_is_refused(task: Any) -> None:
    for row in ({}, {"text": "t"}, {"text": "t", "label": "mixed"}, {"question": "q", "contexts": []}):
        with pytest.raises(DataError):
            task.items(row)
