"""A silo's rows in tokens: training, held out, choices, and what the model reads to score one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Tokens
from isthmus.errors import DataError
from tests.conftest import make_recipe, save_tiny_tokenizer, write_rows

ROWS = [{"text": "w5 w6", "label": "w7"}, {"text": "w8", "label": "w9"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def data_of(folder: Path, tokenizer: PreTrainedTokenizerFast, *, held_out: bool = False, **task: Any) -> SiloData:
    path = str(write_rows(folder / "rows.jsonl", ROWS))
    silo = {"name": "a", "train": path, **({"held_out": path} if held_out else {})}
    recipe = make_recipe(Path("none"), silo=[silo], task={"prompt": "{text}", "answer": "{label}", **task})
    return SiloData(recipe.silo[0], recipe, tokenizer)


def test_rows_are_read_and_free_text_is_closed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = data_of(tmp_path, tokenizer)
    assert [(row.prompt, row.answer) for row in data.train] == [([5, 6], [7, 2]), ([8], [9, 2])]
    assert (data.name, data.held_out, data.choices, data.pad) == ("a", [], [], 0)
    assert data.evaluation_inputs(data.train[0]) == [data.train[0]]


def test_choices_are_not_closed_and_one_token_needs_the_prompt_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = data_of(tmp_path, tokenizer, held_out=True, choices=["w7", "w9"])
    assert data.choices == [(7,), (9,)]
    assert [row.answer for row in data.held_out] == [[7], [9]]
    assert data.evaluation_inputs(data.held_out[0]) == [Tokens([5, 6], [])]


def test_longer_choices_are_read_with_the_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = data_of(tmp_path, tokenizer, answer="{label} w4", choices=["w7 w4", "w9 w4"])
    assert data.evaluation_inputs(data.train[0]) == [Tokens([5, 6], [7, 4]), Tokens([5, 6], [9, 4])]


def test_an_answer_that_is_no_choice_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="w9"):
        data_of(tmp_path, tokenizer, choices=["w7", "w8"])
