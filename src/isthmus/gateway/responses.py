"""Answers in OpenAI's shapes, whole and in chunks of a stream."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.gateway.generation import AnswerPiece, Finish, PlacedToken

LEAST_LOG_PROB = -9999.0
"""Stands for minus infinity, as in OpenAI's answers."""
Spell = Callable[[Sequence[int]], list[str]]
"""Each token's own text."""


@dataclass(frozen=True)
class Envelope:
    """What all chunks of an answer have in common."""

    id: str
    created: int
    """Seconds since the epoch."""
    model: str
    fingerprint: str


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens."""

    prompt: int
    written: int
    reused: int = 0
    """Of the prompts, those that did not cross again."""

    def body(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.written,
            "total_tokens": self.prompt + self.written,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }


class AnswerShape(ABC):
    """How one endpoint writes its answers.

    Args:
        noted: whether log-probabilities are asked for.
    """

    whole_kind: str
    chunk_kind: str

    def __init__(self, envelope: Envelope, spell: Spell, *, noted: bool) -> None:
        self._envelope, self._spell, self._noted = envelope, spell, noted

    def whole(self, answers: Sequence[AnswerPiece], usage: Usage, privacy: dict[str, Any]) -> dict[str, Any]:
        """All answers, one piece each."""
        choices = [self._choice(one) for one in answers]
        return self._head(self.whole_kind) | {"choices": choices, "usage": usage.body(), "privacy": privacy}

    def chunk(self, piece: AnswerPiece, *, first: bool) -> dict[str, Any]:
        """A piece of a stream.

        Args:
            first: whether it is its answer's first.
        """
        return self._head(self.chunk_kind) | {"choices": [self._part(piece, first=first)]}

    def last(self, usage: Usage, privacy: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the numbers of tokens."""
        return self._head(self.chunk_kind) | {"choices": [], "usage": usage.body(), "privacy": privacy}

    @abstractmethod
    def _choice(self, answer: AnswerPiece) -> dict[str, Any]: ...

    @abstractmethod
    def _part(self, piece: AnswerPiece, *, first: bool) -> dict[str, Any]: ...

    def _head(self, kind: str) -> dict[str, Any]:
        own = self._envelope
        return {
            "id": own.id,
            "object": kind,
            "created": own.created,
            "model": own.model,
            "system_fingerprint": own.fingerprint,
        }


class ChatShape(AnswerShape):
    """Of ``/v1/chat/completions``."""

    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def _choice(self, answer: AnswerPiece) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return self._of(answer.answer, {"message": message}, answer.tokens, answer.finish)

    def _part(self, piece: AnswerPiece, *, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant"} if first else {}
        delta |= {"content": piece.text} if piece.text or first else {}
        return self._of(piece.answer, {"delta": delta}, piece.tokens, piece.finish)

    def _of(
        self, number: int, said: dict[str, Any], tokens: Sequence[PlacedToken], finish: Finish | None
    ) -> dict[str, Any]:
        content = [self._token(one) for one in tokens]
        log_probs = {"content": content, "refusal": None} if self._noted else None
        return {"index": number, **said, "logprobs": log_probs, "finish_reason": finish}

    def _token(self, token: PlacedToken) -> dict[str, Any]:
        scored = token.scored
        own, *others = self._spell([scored.token, *(one for one, _ in scored.best)])
        best = [_spelled(text, value) for text, (_, value) in zip(others, scored.best, strict=True)]
        return _spelled(own, scored.log_prob) | {"top_logprobs": best}


class CompletionShape(AnswerShape):
    """Of ``/v1/completions``."""

    whole_kind = chunk_kind = "text_completion"

    def _choice(self, answer: AnswerPiece) -> dict[str, Any]:
        return {
            "index": answer.answer,
            "text": answer.text,
            "logprobs": self._log_probs(answer.tokens) if self._noted else None,
            "finish_reason": answer.finish,
        }

    def _part(self, piece: AnswerPiece, *, first: bool) -> dict[str, Any]:
        return self._choice(piece)

    def _log_probs(self, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
        best = [
            dict(zip(self._spell([token for token, _ in one.scored.best]), _finite(one), strict=True)) for one in tokens
        ]
        return {
            "tokens": self._spell([one.scored.token for one in tokens]),
            "token_logprobs": [max(one.scored.log_prob, LEAST_LOG_PROB) for one in tokens],
            "top_logprobs": best,
            "text_offset": [one.place for one in tokens],
        }


def event(body: dict[str, Any] | str) -> str:
    """A server-sent event."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    return f"data: {text}\n\n"


def merged_pieces(pieces: Sequence[AnswerPiece]) -> AnswerPiece:
    """All pieces of one answer as one."""
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return AnswerPiece(pieces[0].answer, "".join(piece.text for piece in pieces), tokens, pieces[-1].finish)


def _spelled(text: str, log_prob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(log_prob, LEAST_LOG_PROB), "bytes": list(text.encode("utf-8", "replace"))}


def _finite(token: PlacedToken) -> list[float]:
    return [max(value, LEAST_LOG_PROB) for _, value in token.scored.best]
