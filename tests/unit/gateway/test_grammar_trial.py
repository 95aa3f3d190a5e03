"""A grammar that takes too long, or breaks the compiler, ends its own process."""

from __future__ import annotations

import time
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from isthmus.gateway import grammar_trial
from isthmus.gateway.grammar_trial import TOO_COMPLEX, new_matcher, try_grammar


def grammar(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema)


def test_what_passes_and_what_does_not() -> None:
    assert try_grammar(grammar({"type": "object"})) == ""
    assert "Invalid type" in try_grammar(grammar({"type": "nothing"}))
    assert TOO_COMPLEX not in try_grammar("no grammar") != ""


def test_a_compilation_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock here; by the processor's time in ``test_answer_grammar``."""
    monkeypatch.setattr(grammar_trial, "MAX_SECONDS", 0.5)
    started = time.monotonic()
    assert try_grammar(grammar({"type": "integer", "multipleOf": 999_983})) == TOO_COMPLEX
    assert time.monotonic() - started < 5


def test_a_matcher_says_what_its_first_mask_finds() -> None:
    """A definition that is nothing but itself compiles, and allows nothing."""
    tokenizer = LLTokenizer("byte")
    assert not new_matcher(tokenizer, grammar({"type": "null"})).is_error()
    assert new_matcher(tokenizer, grammar({"$ref": "#"})).is_error()
