"""Bodies: what they say, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from isthmus.gateway.requests import NOT_OFFERED, ChatBody, CompletionBody, SampledBody, body_problem

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hello"}


@pytest.mark.parametrize("name", NOT_OFFERED)
def test_what_is_not_offered_is_refused_by_name(name: str) -> None:
    harmless, why = NOT_OFFERED[name]
    for body, kind in ((CHAT, ChatBody), (TEXT, CompletionBody)):
        for value in (*harmless, None):
            assert kind.model_validate(body | {name: value})
        with pytest.raises(ValidationError, match=f"{name} is not offered: ") as found:
            kind.model_validate(body | {name: "anything else"})
        (error,) = found.value.errors()
        assert error["ctx"]["param"] == name
        assert why in error["msg"]


def test_true_is_not_one() -> None:
    with pytest.raises(ValidationError, match="best_of is not offered"):
        CompletionBody.model_validate(TEXT | {"best_of": True})
    with pytest.raises(ValidationError, match="valid integer"):
        CompletionBody.model_validate(TEXT | {"n": True})


def test_null_stands_for_what_is_left_out() -> None:
    """As OpenAI's clients send a message that they have got."""
    said = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "audio": None, "name": None}
    nulls = dict.fromkeys(SampledBody.model_fields.keys() - {"model"})
    body = ChatBody.model_validate({**nulls, **CHAT, "messages": [*CHAT["messages"], said, *CHAT["messages"]]})
    assert body.temperature == 1.0
    assert [message.text for message in body.messages] == ["hello", "hi", "hello"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"unknown": 1},
        {"temperature": "1"},
        {"temperature": float("nan")},
        {"n": 1.5},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"1": 101}},
        {"max_tokens": 0},
        {"top_logprobs": 21, "logprobs": True},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "tool", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "a", "name": "b"}]},
        {"messages": "hello"},
    ],
    ids=str,
)
def test_malformed(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ChatBody.model_validate(CHAT | wrong)


@pytest.mark.parametrize(
    ("prompt", "several"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts(prompt: Any, several: Any) -> None:
    assert CompletionBody.model_validate(TEXT | {"prompt": prompt}).prompts == several


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", 1], [-1], [1.0], None, {"a": 1}, [[[1]]]], ids=str)
def test_no_prompts(prompt: Any) -> None:
    with pytest.raises(ValidationError):
        CompletionBody.model_validate(TEXT | {"prompt": prompt})


def test_lengths_and_stops() -> None:
    assert ChatBody.model_validate(CHAT).longest is None
    assert ChatBody.model_validate(CHAT | {"max_completion_tokens": 3}).longest == 3
    assert ChatBody.model_validate(CHAT | {"max_completion_tokens": 3, "max_tokens": 3}).longest == 3
    with pytest.raises(ValidationError, match="max_completion_tokens differ"):
        ChatBody.model_validate(CHAT | {"max_completion_tokens": 3, "max_tokens": 4})
    assert CompletionBody.model_validate(TEXT).max_tokens == 16
    assert CompletionBody.model_validate(TEXT | {"stop": "a"}).stops == ("a",)
    assert CompletionBody.model_validate(TEXT | {"stop": ["a", "b"]}).stops == ("a", "b")
    assert CompletionBody.model_validate(TEXT | {"logit_bias": {"7": -1}}).settings().logit_bias == {7: -1.0}


@pytest.mark.parametrize(
    ("wrong", "param", "code"),
    [
        ({"unknown": "SECRET"}, "unknown", "unknown_parameter"),
        ({"tools": ["SECRET"]}, "tools", "unsupported_parameter"),
        ({"temperature": "SECRET"}, "temperature", None),
        ({"messages": [{"role": "SECRET", "content": "SECRET"}]}, "messages.0.role", None),
        ({"messages": "SECRET"}, "messages", None),
        ({"top_logprobs": 3}, "top_logprobs", None),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_without_what_was_in_it(wrong: dict[str, Any], param: str, code: str | None) -> None:
    with pytest.raises(ValidationError) as found:
        ChatBody.model_validate(CHAT | wrong)
    problem = body_problem(found.value.errors()[0])
    assert (problem.status, problem.param, problem.code) == (400, param, code)
    assert param in problem.message
    assert "SECRET" not in problem.message
