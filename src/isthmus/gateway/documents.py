"""Bodies of answers, as the gateway's OpenAPI document describes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

Number = float | int


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Of every error."""

    error: ErrorDetail


class PromptDetail(BaseModel):
    """Of a prompt's tokens."""

    cached_tokens: int
    """Those of a kept conversation, which did not cross again."""


class UsageBody(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetail


class PrivacyBody(BaseModel):
    """What left the silo for an answer; also in the headers ``X-Isthmus-*`` of an answer that is no stream."""

    releases: int
    bytes: int
    epsilon: Number | None
    """Of the record that it cost most; null: there is no bound."""
    delta: Number


class AnsweredBody(BaseModel):
    """What all answers have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageBody
    privacy: PrivacyBody


class AnswerMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(AnsweredBody):
    """Of ``/v1/chat/completions``."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(AnsweredBody):
    """Of ``/v1/completions``."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ModelBody(BaseModel):
    """The model that the gateway serves."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsBody(BaseModel):
    """Of ``/v1/models``."""

    object: Literal["list"]
    data: list[ModelBody]


class HealthBody(BaseModel):
    """Of ``/healthz``."""

    status: Literal["ok"]
    running: int
    waiting: int
