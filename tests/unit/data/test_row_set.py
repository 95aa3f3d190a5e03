"""Rows in tokens: what becomes of long ones, and bad ones by their places."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from isthmus.data.bad_rows import BadRows
from isthmus.data.row_set import RowSet, as_tokens
from isthmus.data.templates import Example, Placed
from isthmus.data.tokens import Tokens
from isthmus.errors import DataError
from tests.conftest import make_recipe, save_tiny_tokenizer

TEXTS: list[Placed] = [
    ("f:1", Example("w5 w6", "w7")),
    ("f:2", Example("w5 w6 w7 w8", "w9")),
    ("f:3", Example("w4", "w5 w6 w7")),
    ("f:4", Example("w4 w5 w6 w7", "w8")),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def rows(tokenizer: PreTrainedTokenizerFast, texts: list[Placed], bad: BadRows, **train: object) -> RowSet:
    return as_tokens(texts, make_recipe(Path("none"), train=train), tokenizer, bad, pad=0)


def test_rows_that_fit_are_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = BadRows()
    for policy in ("truncate", "skip", "refuse"):
        found = rows(tokenizer, TEXTS, bad, max_tokens=6, long_rows=policy)
        assert found.rows[:2] == [Tokens([5, 6], [7, 2]), Tokens([5, 6, 7, 8], [9, 2])]
        assert found.texts == TEXTS
        assert (found.lengths, found.truncated, found.skipped, found.note) == ([4, 6, 5, 6], 0, 0, "")
    assert bad.count == 0


def test_long_rows_lose_the_beginning_of_their_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = BadRows()
    found = rows(tokenizer, TEXTS, bad, max_tokens=5)
    assert found.rows[1] == Tokens([6, 7, 8], [9, 2])
    assert (found.texts, found.truncated, found.lengths) == (TEXTS, 2, [4, 6, 5, 6])
    assert found.note == "of 4 rows 2 lose a part of their prompt"
    assert bad.count == 0


def test_examples_of_one_row_are_each_shortened(tokenizer: PreTrainedTokenizerFast) -> None:
    """A row may give several examples, all at its place."""
    texts: list[Placed] = [("f:1", Example("w5 w6 w7 w8", "w9")), ("f:1", Example("w8 w7 w6 w5", "w4"))]
    found = rows(tokenizer, texts, BadRows(), max_tokens=5)
    assert [row.prompt for row in found.rows] == [[6, 7, 8], [7, 6, 5]]
    assert (found.texts, found.truncated) == (texts, 2)


def test_long_rows_are_skipped(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = BadRows()
    found = rows(tokenizer, TEXTS, bad, max_tokens=4, long_rows="skip")
    assert (found.rows, found.texts) == ([Tokens([5, 6], [7, 2])], TEXTS[:1])
    assert (found.skipped, found.lengths, found.note) == (3, [4, 6, 5, 6], "of 4 rows 3 are skipped")
    assert bad.count == 0


def test_long_rows_are_refused_by_their_places(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = BadRows()
    assert rows(tokenizer, TEXTS, bad, max_tokens=5, long_rows="refuse").texts == [TEXTS[0], TEXTS[2]]
    with pytest.raises(DataError, match=r"^2 rows .*: f:2 has 6 tokens, more than train.max_tokens = 5; f:4") as caught:
        bad.raise_any()
    assert "train.long_rows" in caught.value.remedy


def test_an_answer_without_room_for_a_prompt_is_bad_by_its_place(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = BadRows()
    found = rows(tokenizer, TEXTS, bad, max_tokens=4)
    assert [place for place, _ in found.texts] == ["f:1", "f:2", "f:4"]
    with pytest.raises(DataError, match=r"^f:3: a row has 1 prompt and 4 answer tokens"):
        bad.raise_any()


def test_rows_without_a_token_are_bad_and_the_others_are_read(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = BadRows()
    texts: list[Placed] = [*TEXTS, ("f:5", Example(" ", "w4")), ("f:6", Example("", "w4"))]
    assert rows(tokenizer, texts, bad).texts == TEXTS
    with pytest.raises(DataError, match=r"^2 rows .*f:5: a row has 0 prompt"):
        bad.raise_any()
