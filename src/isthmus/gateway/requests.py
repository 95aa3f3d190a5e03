"""Bodies of requests, as OpenAI's API has them. What is not offered is refused by name, never skipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from isthmus.gateway.answer_grammar import ANY_OBJECT
from isthmus.gateway.problems import Problem
from isthmus.gateway.sampling import SamplingSettings

NOT_OFFERED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "the model writes text"),
    "best_of": ((1,), "each answer that is computed is given; ask for several with n"),
    "echo": ((False,), "the prompt is not repeated"),
    "function_call": (("none",), "the model calls no functions"),
    "functions": ((), "the model calls no functions"),
    "modalities": ((["text"],), "the model writes text"),
    "parallel_tool_calls": ((), "the model calls no tools"),
    "prediction": ((), "drafts are the silo's own"),
    "prompt_cache_key": ((), "a kept conversation is found by its tokens"),
    "prompt_cache_retention": ((), "conversations are kept as the gateway was started"),
    "reasoning_effort": ((), "the model has no such setting"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "store": ((False,), "nothing is stored"),
    "suffix": (("",), "the model writes after a prompt, not into it"),
    "tool_choice": (("none",), "the model calls no tools"),
    "tools": ((), "the model calls no tools"),
    "top_k": ((), "OpenAI's API has none: use top_p"),
    "verbosity": ((), "the model has no such setting"),
    "web_search_options": ((), "the gateway searches nothing"),
}
"""Arguments that are refused: values that ask for what happens anyway, and why others are refused."""
COMPLAINTS: Mapping[str, str | None] = {
    "not_offered": "unsupported_parameter",
    "not_streamed": None,
    "no_logprobs": None,
    "two_lengths": None,
    "no_question": None,
}
"""The code of each complaint that is made here, by its type. Their messages name the argument."""
Stop = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class GatewayBody(BaseModel):
    """A JSON object in which null stands for what is left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _offered(cls, values: Any) -> Any:
        """Leave out nulls and what asks for what happens anyway; refuse what is not offered."""
        if not isinstance(values, dict):
            return values
        kept = {name: one for name, one in values.items() if one is not None}
        for name in [name for name in kept if name in NOT_OFFERED and name not in cls.model_fields]:
            harmless, why = NOT_OFFERED[name]
            value = kept.pop(name)
            if not any(type(value) is type(one) and value == one for one in harmless):
                raise PydanticCustomError("not_offered", "{param} is not offered: {why}", {"param": name, "why": why})
        return kept


class StreamOptions(GatewayBody):
    """Of a stream."""

    include_usage: bool = False
    """Whether a last chunk has the numbers of tokens."""


class TextFormat(GatewayBody):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(GatewayBody):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(GatewayBody):
    """A JSON schema that answers are held to, ``strict`` or not."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    """Not used."""
    description: str | None = None
    """Not used."""
    definition: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool = False


class JsonSchemaFormat(GatewayBody):
    """JSON of one schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class SampledBody(GatewayBody):
    """What requests for answers have in common."""

    model: Annotated[str, Field(min_length=1)]
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = {}
    """By token id."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    """Answers to each prompt; the prompt crosses once for all."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] = (
        TextFormat(type="text")
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
    """Texts before which an answer ends."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    user: str | None = None
    """Neither used nor kept."""
    metadata: dict[str, str] | None = None
    """Neither used nor kept."""

    @model_validator(mode="after")
    def _streamed(self) -> SampledBody:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "not_streamed", "{param} is of streams: set stream to true", {"param": "stream_options"}
            )
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stops as several."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def schema_held(self) -> Mapping[str, Any] | None:
        """The JSON schema that answers are held to; None: none."""
        if isinstance(self.response_format, JsonSchemaFormat):
            return self.response_format.json_schema.definition
        return ANY_OBJECT if isinstance(self.response_format, JsonObjectFormat) else None

    def settings(self) -> SamplingSettings:
        """How tokens are chosen."""
        return SamplingSettings(
            self.temperature,
            self.top_p,
            self.seed,
            self.presence_penalty,
            self.frequency_penalty,
            {int(token): bias for token, bias in self.logit_bias.items()},
        )


class TextPart(GatewayBody):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(GatewayBody):
    """A turn of a conversation; a developer's is the system's."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(min_length=1)] | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def text(self) -> str:
        """The content's text, its parts one a line."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ChatBody(SampledBody):
    """Of ``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("no_logprobs", "{param} needs logprobs to be true", {"param": "top_logprobs"})
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "two_lengths", "{param} and max_completion_tokens differ: give one", {"param": "max_tokens"}
            )
        if self.messages[-1].role != "user":
            raise PydanticCustomError(
                "no_question",
                "{param}: the last is not the user's, and the model answers the user",
                {"param": "messages"},
            )
        return self

    @property
    def longest(self) -> int | None:
        """Most tokens of an answer; None: not said."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        """As in ``GenerationRequest``."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(SampledBody):
    """Of ``/v1/completions``."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1)]
    )
    """A text or its token ids, or several."""
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


class EmbeddingsBody(BaseModel):
    """Of ``/v1/embeddings``, which is refused whatever is in it."""


def body_problem(complaint: Mapping[str, Any]) -> Problem:
    """What pydantic has found wrong with a body, without anything of what was in it but names of arguments.

    Args:
        complaint: one of the errors of a ``ValidationError``.
    """
    kind, said = complaint["type"], str(complaint["msg"])
    param = complaint.get("ctx", {}).get("param") or ".".join(str(one) for one in complaint["loc"] if one != "body")
    if kind == "json_invalid":
        return Problem(400, "the body is no valid JSON")
    if kind == "extra_forbidden":
        return Problem(400, f"unknown argument: {param}", param=param, code="unknown_parameter")
    if kind in COMPLAINTS:
        return Problem(400, said, param=param, code=COMPLAINTS[kind])
    return Problem(400, f"{param or 'the body'}: {said}", param=param or None)
