"""Rows of known tasks as a silo reads them: prompts, choices of their own, places, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from isthmus.data.conversations import asked_example, asked_text, row_examples
from isthmus.data.known_task import asked_questions, task_examples
from isthmus.data.silo_data import SiloData
from isthmus.data.sources import SourceRow
from isthmus.data.templates import Turn
from isthmus.errors import DataError, RecipeError
from isthmus.recipe import TaskSection
from isthmus.tasks.catalogue import TASKS
from tests.conftest import make_recipe, save_tiny_tokenizer, write_rows

COPA = {"premise": "w4 w5", "choice1": "w6 w9", "choice2": "w7 w8 w9 w5", "question": "cause", "label": 1}
ANSWERS = [{"text": "w6", "label": 1}, {"text": "w7", "label": 0}]
MULTIRC = {"idx": 0, "passage": {"text": "w4 w5", "questions": [{"question": "w8", "answers": ANSWERS}]}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_each_question_of_a_row_has_its_place() -> None:
    examples = row_examples(SourceRow("f:3", MULTIRC), TaskSection(name="multirc"), {})
    assert [place for place, _ in examples] == ["f:3, question 1", "f:3, question 2"]
    assert [example.answer for _, example in examples] == [" yes", " no"]
    assert {example.conversation for _, example in examples} == {"f:3"}  # one record of the privacy budgets
    assert all(example.choices == (" no", " yes") for _, example in examples)
    ((place, example),) = row_examples(SourceRow("f:3", COPA), TaskSection(name="copa"), {})
    assert (place, example.answer) == ("f:3", " w7 w8 w9 w5.")


def test_every_right_choice_of_a_row_is_known(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"passage": "w4 w5 w6", "query": "w7 @placeholder .", "entities": ["w4", "w5", "w6"], "answers": ["w6", "w4"]}
    rows = [row, {**row, "answers": ["w5"]}]
    silo = {"name": "a", "train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    recipe = make_recipe(Path("none"), silo=[silo], task={"name": "record"})
    several, one = SiloData(recipe.silo[0], recipe, tokenizer).train
    assert several.right == (several.choices[0], several.choices[2])
    assert tuple(several.answer) in several.right
    assert one.right == ()


def test_a_row_is_asked_with_no_label_or_any() -> None:
    task, bare = TaskSection(name="copa"), {key: value for key, value in COPA.items() if key != "label"}
    ((_, known),) = task_examples(SourceRow("f:3", COPA), task, {})
    for row in (bare, {**bare, "label": -1}, COPA):
        ((place, asked),) = asked_questions(SourceRow("f:3", row), task)
        assert (place, asked.prompt, asked.choices, asked.answer) == ("f:3", known.prompt, known.choices, "")
        assert asked_example(row, task).prompt == known.prompt
    with pytest.raises(DataError, match="f:3: a row has no text in 'choice2'"):
        asked_questions(SourceRow("f:3", {"choice1": "w6"}), task)
    with pytest.raises(DataError, match="ask 2 questions"):
        asked_example(MULTIRC, TaskSection(name="multirc"))
    with pytest.raises(DataError, match="made of a row's fields") as text:
        asked_text("w5", task)
    assert "--field" in text.value.remedy


def test_in_a_chat_the_question_is_the_users_turn() -> None:
    task = TaskSection(name="copa", chat=True, system="Choose.")
    ((_, example),) = task_examples(SourceRow("f:1", COPA), task, {})
    assert example.turns[0] == Turn("system", "Choose.")
    assert example.turns[1].role == "user"
    assert (example.answer, example.choices) == ("w7 w8 w9 w5.", ("w6 w9.", "w7 w8 w9 w5."))


def test_rows_are_filled_up_to_their_own_longest_choice(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Whichever is right, what the model reads is equally long."""
    rows = [COPA, {**COPA, "label": 0}, {**COPA, "choice2": "w7 w9"}]
    silo = {"name": "a", "train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    recipe = make_recipe(Path("none"), silo=[silo], task={"name": "copa"})
    data = SiloData(recipe.silo[0], recipe, tokenizer)
    right, wrong, short = data.train
    assert len(right.input) == len(wrong.input)
    assert (len(wrong.filler), len(short.filler)) == (2, 0)
    assert data.choices == []
    assert len(data.choices_of(right)) == 2
    assert [one.answer for one in data.evaluation_inputs(wrong)] == [list(one) for one in wrong.choices]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_row_of_something_else_names_its_place(name: str) -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:7: ") as caught:
        row_examples(SourceRow("f.jsonl:7", {"other": 1}), TaskSection(name=name), {})
    assert caught.value.remedy


def test_what_needs_templates_is_refused() -> None:
    task = TaskSection(name="copa")
    with pytest.raises(RecipeError, match=r"sensitivity\.fields"):
        task_examples(SourceRow("f:1", COPA), task, {"premise": "high"})
    with pytest.raises(DataError, match="'copa'") as caught:
        asked_text("why", task)
    assert "--raw" in str(caught.value.remedy)
    with pytest.raises(RecipeError, match="no task 'cop'"):
        row_examples(SourceRow("f:1", COPA), TaskSection(name="cop"), {})


@pytest.mark.parametrize("key", ["prompt", "answer", "choices", "messages", "text"])
def test_a_known_task_has_no_templates_of_the_recipe(key: str) -> None:
    value: Any = ["x"] if key in ("choices", "messages") else "{x}"
    with pytest.raises(ValueError, match=f"leave out task.{key}"):
        TaskSection(**{"name": "copa", key: value})
