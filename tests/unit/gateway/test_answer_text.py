"""Text as it comes: all pieces together are the whole text, up to the first stop."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from isthmus.gateway.answer_text import AnswerText

STORIES = Path(__file__).parents[4] / "shared" / "models" / "stories260k"


def from_bytes(ids: list[int]) -> str:
    """A tokenizer with a token for each byte."""
    return bytes(ids).decode("utf-8", "replace")


def told(ids: list[int], stop: list[str] | None = None) -> tuple[list[str], AnswerText]:
    """Pieces as they come, until a stop."""
    text, pieces = AnswerText(from_bytes, stop or []), list[str]()
    for token in ids:
        text.add(token)
        pieces.append(text.take())
        if text.stopped:
            break
    text.finish()
    return [*pieces, text.take(ended=True)], text


@given(st.text())
def test_pieces_are_the_text(text: str) -> None:
    pieces, answer = told(list(text.encode("utf-8", "replace")))
    assert "".join(pieces) == answer.text == text.encode("utf-8", "replace").decode()
    assert not answer.stopped


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4))
def test_pieces_end_before_the_first_stop(text: str, stop: list[str]) -> None:
    """Of stops that overlap, the one that is complete first; if several are at once, the one that begins first."""
    pieces, answer = told(list(text.encode()), stop)
    ends = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
    assert "".join(pieces) == answer.text == (text[: min(ends)[1]] if ends else text)
    assert answer.stopped == bool(ends)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=5), max_size=3))
def test_only_what_may_become_a_stop_is_held_back(text: str, stop: list[str]) -> None:
    answer = AnswerText(from_bytes, stop)
    for token in text.encode():
        answer.add(token)
        answer.take()
        if answer.stopped:
            return
        held = answer.text[answer._given :]
        assert not held or any(one.startswith(held) for one in stop)


def test_characters_of_several_tokens_come_whole() -> None:
    pieces, _ = told(list("a€b".encode()))
    assert pieces == ["a", "", "", "€", "b", ""]
    pieces, _ = told([97, 0xE2, 0x82])  # the answer ends within one
    assert "".join(pieces) == "a\ufffd"
    assert told([0xE2, 0x28, 97])[0][-2:] == ["a", ""]


def test_places_are_where_tokens_begin() -> None:
    answer = AnswerText(from_bytes)
    assert [answer.add(token) for token in "a€b".encode()] == [0, 1, 1, 1, 2]


@pytest.mark.skipif(not STORIES.exists(), reason=f"no model at {STORIES}")
def test_a_real_tokenizers_text_is_that_of_the_whole() -> None:
    """SentencePiece drops the space before the first word, and writes some characters in bytes."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    for text in ("Once upon a time, there was a girl.", "  two  spaces\n\nand a line", "naïve – “quoted” 🙂 end", "x"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(min(4, len(ids))):
            answer, pieces = AnswerText(lambda own: str(tokenizer.decode(own, skip_special_tokens=True))), []
            for token in ids[start:]:
                answer.add(token)
                pieces.append(answer.take())
            answer.finish()
            assert "".join(pieces) + answer.take(ended=True) == tokenizer.decode(ids[start:], skip_special_tokens=True)
