"""What answers a recipe's questions, how long answers may be, and what is answered together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.engines.answering import (
    TOGETHER,
    AnsweringModel,
    PosedQuestion,
    answer_groups,
    answerer_of,
    answering_task,
)
from isthmus.engines.inference import WRITTEN_TOKENS
from isthmus.silo.join import load_tokenizer
from tests.conftest import make_recipe, save_tiny_model, uncut


@pytest.mark.parametrize(
    ("task", "asked", "longest"),
    [
        ({}, None, WRITTEN_TOKENS),
        ({}, 7, 7),
        ({"name": "scitldr"}, None, 64),
        ({"name": "coqa"}, None, 32),
        ({"name": "coqa"}, 50, 50),
        ({"name": "rte"}, 50, 0),
        ({"choices": ["a", "b"]}, 50, 0),
    ],
)
def test_the_caller_says_how_long_answers_may_be_else_the_task(
    task: dict[str, Any], asked: int | None, longest: int
) -> None:
    found = answering_task(make_recipe(Path("none"), task=task), asked)
    assert found.longest == longest
    assert found.metrics


def test_questions_of_similar_length_go_together_and_under_a_budget_each_alone(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    model, tokenizer = uncut(folder), load_tokenizer(folder)
    questions = [PosedQuestion([5] * (1 + number * 7 % 40)) for number in range(40)]
    groups = answer_groups(AnsweringModel("a", model, tokenizer), questions)
    assert sorted(number for group in groups for number in group) == list(range(40))
    lengths = [len(questions[number].prompt) for group in groups for number in group]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(group) for group in groups] == [TOGETHER, TOGETHER, 8]
    alone = answer_groups(AnsweringModel("a", model, tokenizer, limited=True), questions)
    assert alone == [[number] for number in range(40)]


def test_own_choices_and_those_of_the_task(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    recipe = make_recipe(folder, task={"prompt": "{text}", "choices": ["w8", "w9 w10"]})
    answer = answerer_of(AnsweringModel("a", uncut(folder), load_tokenizer(folder)), recipe, answering_task(recipe))
    own = PosedQuestion([5, 6], (" w11", " w12"), ("first", "second"))
    task, other = answer([PosedQuestion([5, 6]), own])
    assert task.log_probs.keys() == {"w8", "w9 w10"}
    assert other.log_probs.keys() == {"first", "second"}
    for said in (task, other):
        assert said.finish == "choice"
        assert said.answer == max(said.log_probs, key=said.log_probs.__getitem__)
    assert answer([own])[0].log_probs == pytest.approx(other.log_probs, rel=1e-5)
