"""Text read from tokens as they come is the text they stand for, with each token's characters."""

from __future__ import annotations

from functools import cache
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from isthmus.privacy.detokenizer import CONTEXT_CHARACTERS, Detokenizer
from isthmus.privacy.sensitivity import Sensitivity
from isthmus.recipe import SensitivitySection

SECTION = {"detectors": ["email", "card", "date"], "classes": {"high": {"noise": 2.0}}}
TEXTS = st.text(max_size=60) | st.lists(
    st.sampled_from(
        [" the", "né", "患者", "👩‍⚕️", "a@b.org", " 4111 1111", " 1111 1111", "\n", "e\u0301", "2009-01-10", "x"]
    )
).map("".join)


@cache
def tokenizer() -> Any:
    """Byte-level BPE, as of SmolLM2: characters of several bytes may be several tokens, or share one."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the patient, the doctor né à 患者さん 1111 2009"] * 3, trainer)
    return made


def decode(ids: list[int]) -> str:
    text: str = tokenizer().decode(ids, skip_special_tokens=False)
    return text


def reading() -> Detokenizer:
    return Detokenizer(Sensitivity(SensitivitySection.model_validate(SECTION)), decode)


@settings(derandomize=True, deadline=None)
@given(TEXTS)
def test_text_and_offsets_are_the_tokenizers_own(text: str) -> None:
    encoded = tokenizer().encode(text)
    one = reading()
    one.extend(encoded.ids)
    assert one.text == text
    covered = [text[start:end] for start, end in one.offsets]
    for (start, end), (first, last) in zip(one.offsets, encoded.offsets, strict=True):
        assert start <= first <= last <= end, "whatever a token stands for is within its stretch"
    assert all(covered)
    assert {place for start, end in one.offsets for place in range(start, end)} == set(range(len(text)))


@settings(derandomize=True, deadline=None)
@given(TEXTS, st.data())
def test_however_the_tokens_come_the_text_is_the_same(text: str, data: st.DataObject) -> None:
    ids = tokenizer().encode(text).ids
    at_once, in_pieces = reading(), reading()
    at_once.extend(ids)
    while len(in_pieces) < len(ids):
        size = data.draw(st.integers(1, 5))
        in_pieces.extend(ids[len(in_pieces) : len(in_pieces) + size])
    assert in_pieces.text == at_once.text
    assert in_pieces.offsets == at_once.offsets
    assert all(late >= early for late, early in zip(in_pieces.classes, at_once.classes, strict=True))


@settings(derandomize=True, deadline=None)
@given(TEXTS, TEXTS, st.data())
def test_what_is_forgotten_leaves_no_trace_in_the_text(text: str, more: str, data: st.DataObject) -> None:
    ids = tokenizer().encode(text).ids
    gone = data.draw(st.integers(0, len(ids)))
    one, other = reading(), reading()
    one.extend(ids)
    one.forget(gone)
    other.extend(ids[: len(ids) - gone])
    twin = one.copy()
    for each in (one, other, twin):
        each.extend(tokenizer().encode(more).ids)
    assert one.text == other.text == twin.text
    assert one.offsets == other.offsets == twin.offsets
    assert one.classes == twin.classes


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text_are_read_too(ids: list[int]) -> None:
    one = reading()
    one.extend(ids)
    assert len(one.offsets) == len(one.classes) == len(one) == len(ids)
    assert all(0 <= start <= end <= len(one.text) for start, end in one.offsets)


def test_a_token_is_known_for_sensitive_once_the_text_shows_it() -> None:
    one = reading()
    ids = tokenizer().encode("pay 4111 1111 1111 1111 now").ids
    places = tokenizer().encode("pay 4111 1111 1111 1111 now").offsets
    for token in ids:
        one.extend([token])
    marked = {place for place, number in zip(places, one.classes, strict=True) if number}
    assert marked == {(start, end) for start, end in places if 4 <= start < 23 and end > 4}


def test_what_is_known_from_elsewhere_is_kept() -> None:
    one = reading()
    one.extend(tokenizer().encode("the patient").ids)
    one.raise_to([1, 0])
    one.extend(tokenizer().encode(" is well").ids)
    assert one.classes[0] == 1
    assert not any(one.classes[1:])


def test_work_grows_with_the_length_and_not_with_its_square() -> None:
    looked: list[int] = []

    class Counting(Sensitivity):
        def classes(self, text: str, *others: Any) -> list[int]:
            looked.append(len(text))
            return super().classes(text, *others)

    one = Detokenizer(Counting(SensitivitySection.model_validate(SECTION)), decode)
    for token in tokenizer().encode("word, " * 200).ids:
        one.extend([token])
    assert max(looked) <= 3 * CONTEXT_CHARACTERS


def test_a_token_within_an_unfinished_character_takes_the_class_before_it() -> None:
    ids = tokenizer().encode("a@b.orgж").ids
    one = reading()
    one.extend(ids[:-1])
    assert one.text == "a@b.org"
    assert one.classes == [1] * (len(ids) - 1)
