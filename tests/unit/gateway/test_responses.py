"""Answers in OpenAI's shapes: its own types read them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from isthmus.gateway.documents import ChatAnswer, CompletionAnswer
from isthmus.gateway.generation import AnswerPiece, PlacedToken
from isthmus.gateway.responses import (
    LEAST_LOG_PROB,
    ChatShape,
    CompletionShape,
    Envelope,
    Usage,
    event,
    merged_pieces,
)
from isthmus.gateway.sampling import ScoredToken

ENVELOPE = Envelope("id-1", 1_700_000_000, "model", "run-3")
PRIVACY = {"releases": 1, "bytes": 2, "epsilon": None, "delta": 1e-5}
TOKENS = (
    PlacedToken(ScoredToken(3, -0.5, ((3, -0.5), (4, -math.inf))), 0),
    PlacedToken(ScoredToken(4, -math.inf, ((3, -0.1), (4, -math.inf))), 2),
)
ANSWER = AnswerPiece(1, "t3t4", TOKENS, "stop")


def spell(tokens: Sequence[int]) -> list[str]:
    return [f"t{token}" for token in tokens]


def test_whole_answers() -> None:
    chat = ChatShape(ENVELOPE, spell, noted=True).whole([ANSWER], Usage(5, 7, 3), PRIVACY)
    text = CompletionShape(ENVELOPE, spell, noted=True).whole([ANSWER], Usage(5, 7, 3), PRIVACY)
    for body in (chat, text):
        assert "Infinity" not in json.dumps(body)
        assert body["usage"] == {
            "prompt_tokens": 5,
            "completion_tokens": 7,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
    ChatAnswer.model_validate(chat)
    CompletionAnswer.model_validate(text)
    content = ChatCompletion.model_validate(chat).choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert [(one.token, one.logprob) for one in content] == [("t3", -0.5), ("t4", LEAST_LOG_PROB)]
    own = Completion.model_validate(text).choices[0]
    assert own.logprobs is not None
    assert (own.logprobs.tokens, own.logprobs.text_offset) == (["t3", "t4"], [0, 2])


def test_without_log_probabilities_they_are_null() -> None:
    chat = ChatShape(ENVELOPE, spell, noted=False).whole([ANSWER], Usage(5, 7, 3), PRIVACY)
    assert chat["choices"][0]["logprobs"] is None


def test_chunks() -> None:
    shape = ChatShape(ENVELOPE, spell, noted=False)
    first = shape.chunk(AnswerPiece(0, "", (), None), first=True)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    last = shape.chunk(AnswerPiece(0, "", (), "length"), first=False)
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    for one in (first, last, shape.last(Usage(1, 2), PRIVACY)):
        ChatCompletionChunk.model_validate(one)


def test_events_are_lines() -> None:
    assert event("[DONE]") == "data: [DONE]\n\n"
    assert json.loads(event({"a": "x\n\ny\u2028"}).removeprefix("data: ")) == {"a": "x\n\ny\u2028"}
    assert event({"a": "x\n\ny"}).count("\n") == 2


def test_pieces_are_merged() -> None:
    pieces = [AnswerPiece(1, "t3", TOKENS[:1]), AnswerPiece(1, "t4", TOKENS[1:], "stop")]
    assert merged_pieces(pieces) == ANSWER
