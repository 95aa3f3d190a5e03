"""Figures as a table's cells show them."""

from __future__ import annotations

import math

import pytest

from isthmus.report.formatting import epsilon_text, megabytes, score_text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (math.inf, "∞"), (0.0, "0"), (7.4321, "7.43"), (999.0, "999"), (123456.7, "123,457")],
)
def test_an_epsilon(value: float | None, text: str) -> None:
    assert epsilon_text(value) == text


def test_bytes_and_scores() -> None:
    assert megabytes(1_250_000) == "1.2 MB"
    assert score_text({"accuracy": 0.856, "loss": 1.0}) == "85.6%"
    assert score_text({"loss": 1.23456}) == "1.235"


def test_scores_of_neither_kind_are_refused() -> None:
    with pytest.raises(KeyError):
        score_text({"perplexity": 3.0})
