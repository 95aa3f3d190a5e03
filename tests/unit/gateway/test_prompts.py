"""Prompts: the tokens of ``isthmus generate``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from isthmus.data.templates import Turn
from isthmus.data.tokens import ending_tokens, prompt_tokens
from isthmus.engines.inference import PromptRequest
from isthmus.errors import DataError, ModelError
from isthmus.gateway.prompts import PromptReader
from isthmus.recipe import TaskSection
from tests.conftest import VOCABULARY, save_tiny_tokenizer
from tests.integration.gateways import TEMPLATE


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    save_tiny_tokenizer(tmp_path)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("system", ["", "w50 w51"])
def test_tokens_are_those_of_generate(system: str, tokenizer: PreTrainedTokenizerBase) -> None:
    reader, task = PromptReader(tokenizer, VOCABULARY, (7,), system), _task(system)
    for text in ("w4 w5", "w6  w7\n w8", "</s> w9"):
        for asked, read in (
            (PromptRequest(text, chat=True), reader.conversation([Turn("user", text)])),
            (PromptRequest(text, raw=True), reader.text(text)),
        ):
            example = asked.example(task)
            assert read.ids == prompt_tokens(example, tokenizer)
            assert set(read.ends) == {7, *ending_tokens(example, tokenizer)}


def test_a_systems_turn_of_its_own_takes_the_recipes_place(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [Turn("system", "w60"), Turn("user", "w4")]
    plain, own = (PromptReader(tokenizer, VOCABULARY, (), system) for system in ("", "w50"))
    assert own.conversation(turns) == plain.conversation(turns)
    assert own.conversation(turns[1:]) == plain.conversation([Turn("system", "w50"), *turns[1:]])


def test_what_cannot_be_read_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    reader = PromptReader(tokenizer, VOCABULARY)
    with pytest.raises(DataError, match="vocabulary"):
        reader.ids([4, VOCABULARY])
    with pytest.raises(DataError, match="surrogate"):
        reader.text("\ud800")
    with pytest.raises(DataError, match="no token"):
        PromptReader(_without_beginning(tokenizer), VOCABULARY).text("  ")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="chat template"):
        PromptReader(tokenizer, VOCABULARY).conversation([Turn("user", "w4")])
    assert reader.ids([4, VOCABULARY - 1]).ids == [4, VOCABULARY - 1]
    assert reader.spelled([4, 5]) == ["w4", "w5"]


def test_threads_read_at_once(tokenizer: PreTrainedTokenizerBase) -> None:
    reader = PromptReader(tokenizer, VOCABULARY)
    texts = [f"w{number} " * number for number in range(4, 60)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(reader.text, texts * 4)) == [reader.text(text) for text in texts] * 4


def _task(system: str) -> TaskSection:
    return TaskSection(system=system, messages=("messages",)) if system else TaskSection()


def _without_beginning(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    assert tokenizer("w4")["input_ids"] == [4]
    return tokenizer
