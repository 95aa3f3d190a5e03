"""Prompt and answer in the tokens that they have in running text, for tokenizers of every kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from isthmus.data.encoding import Encoded, TextEncoder
from isthmus.errors import DataError
from tests.unit.data.readers import CHATML, TOKENIZERS, byte_level, chatting, controls, slow_bytes, stories, unigram

WORDS = st.sampled_from(["she is", "Sentiment:", "no one", "happy,", "a/b", "Answer:\n", "é", "<tag>"])
PROMPTS = st.lists(WORDS, min_size=1, max_size=5).map(" ".join)
CLEAN = [("Sentiment:", " happy"), ("The answer is", " no one"), ("Answer:\n", "yes"), ("She is", ", no")]
"""Prompts and answers between which no tokenizer makes one token."""


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]()


def framed(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text in tokens as the tokenizer reads it by itself, with its beginning and without its end."""
    bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer(text)["input_ids"]
    return whole[: len(whole) - 1] if whole[-1:] != bare[-1:] else whole


@pytest.mark.parametrize(("prompt", "answer"), CLEAN)
def test_both_together_are_the_whole_text_read_once(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> None:
    first, second = TextEncoder(tokenizer).pair(prompt, answer)
    assert first.ids + second.ids == framed(tokenizer, prompt + answer)
    assert first.ids == framed(tokenizer, prompt)
    assert second.ids == TextEncoder(tokenizer).answer(answer).ids


@settings(deadline=None, max_examples=60)
@given(prompt=PROMPTS, answers=st.lists(PROMPTS, min_size=2, max_size=3), joint=st.sampled_from(["", " "]))
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_prompt_has_the_same_tokens_whatever_its_answer(
    kind: str, prompt: str, answers: list[str], joint: str
) -> None:
    encoder = TextEncoder(TOKENIZERS[kind]())
    alone = encoder.prompt(prompt)
    for answer in answers:
        first, second = encoder.pair(prompt, joint + answer)
        assert first == alone
        assert second.ids
        assert not {*second.ids} & controls(TOKENIZERS[kind]())


@pytest.mark.parametrize("make", [unigram, byte_level, stories])
def test_a_word_after_a_space_is_one_token_behind_any_prompt(make: Callable[[], PreTrainedTokenizerBase]) -> None:
    tokenizer = make()
    encoder = TextEncoder(tokenizer)
    assert len(encoder.answer(" happy").ids) == 1
    assert encoder.pair("Sentiment:", " happy")[1].ids == encoder.answer(" happy").ids
    if make is stories:  # alone it gets a second space
        assert len(tokenizer(" happy", add_special_tokens=False)["input_ids"]) == 2


def test_a_token_across_the_place_where_they_meet_is_divided() -> None:
    encoder = TextEncoder(byte_level())
    together = byte_level()("she is happy")["input_ids"]
    first, second = encoder.pair("she is hap", "py")
    assert first == encoder.prompt("she is hap")
    assert first.ids + second.ids != together
    assert byte_level().decode(first.ids + second.ids) == "she is happy"


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "slow bytes"])
@pytest.mark.parametrize(("prompt", "answer"), [*CLEAN, ("hap", "py"), ("She ", "is"), ("is </s>", " [SEP]")])
def test_places_of_an_answers_tokens_are_in_the_answer(kind: str, prompt: str, answer: str) -> None:
    first, second = TextEncoder(TOKENIZERS[kind]()).pair(prompt, answer)
    whole = prompt + answer
    assert all(0 <= start <= end <= len(prompt) for start, end in first.offsets)
    assert all(len(prompt) <= start < end <= len(whole) for start, end in second.offsets)
    covered = {place for start, end in second.offsets for place in range(start, end)}
    assert {place for place in range(len(prompt), len(whole)) if not whole[place].isspace()} <= covered


def test_what_a_tokenizer_adds_stands_once_before_and_never_within() -> None:
    assert TextEncoder(unigram()).beginning == [1]
    assert TextEncoder(byte_level()).beginning == TextEncoder(slow_bytes()).beginning == []
    assert TextEncoder(unigram()).prompt("").ids == [1]
    first, second = TextEncoder(unigram()).pair("she is", " happy")
    assert (first.ids.count(1), {1, 2} & {*first.ids[1:], *second.ids}) == (1, set())


def test_a_template_writes_control_tokens_and_a_text_does_not() -> None:
    tokenizer = byte_level()
    start, end = (tokenizer.convert_tokens_to_ids(f"<|im_{one}|>") for one in ("start", "end"))
    text = "<|im_start|>she <|im_end|> is<|im_end|>"
    marked = [(0, 12), (len(text) - 10, len(text))]
    read = TextEncoder(tokenizer).prompt(text, marked)
    assert (read.ids[0], read.ids[-1], read.ids.count(end)) == (start, end, 1)
    assert tokenizer.decode(read.ids) == text
    assert TextEncoder(tokenizer).prompt("<|im_start|>she", [(0, 12)]).ids == tokenizer("<|im_start|>she")["input_ids"]


def test_tokens_around_turns_are_control_tokens_though_not_marked_as_special() -> None:
    tokenizer = chatting(byte_level, CHATML.replace("<|im_start|>", "<|turn|>"))
    tokenizer.add_tokens(["<|turn|>", "<think>", "   "])
    turn, think, spaces = (tokenizer.convert_tokens_to_ids(one) for one in ("<|turn|>", "<think>", "   "))
    read = TextEncoder(tokenizer).prompt("<|turn|>user <think>   <|turn|> she", [(0, 8)])
    assert (read.ids[0], read.ids.count(turn)) == (turn, 1)
    assert {think, spaces} <= {*read.ids}  # which the template does not write
    assert tokenizer.decode(read.ids) == "<|turn|>user <think>   <|turn|> she"
    refusing = chatting(lambda: tokenizer, "{{ raise_exception('no') }}")
    assert turn in TextEncoder(refusing).prompt("<|turn|>she").ids


def test_half_a_surrogate_pair_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="surrogate"):
        TextEncoder(tokenizer).pair("she \ud83d is", " happy")
    assert TextEncoder(tokenizer).pair("she is", " happy")[1].ids


def test_a_control_token_of_one_character_cannot_be_text() -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "¶": 1, "she": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="¶", unk_token="[UNK]")
    with pytest.raises(DataError, match="'¶' is a control token") as caught:
        TextEncoder(fast).prompt("she ¶")
    assert caught.value.remedy
    assert TextEncoder(fast).prompt("she").ids == [2]


def test_tokens_are_chosen_and_moved_with_their_places() -> None:
    read = Encoded([5, 6, 7], [(0, 1), (1, 3), (3, 4)])
    assert read.only([0, 2]) == Encoded([5, 7], [(0, 1), (3, 4)])
    assert read.after(1, -2) == Encoded([6, 7], [(0, 1), (1, 2)])
