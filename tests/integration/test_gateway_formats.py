"""``response_format`` by OpenAI's own client: the model's weights are random, and its answers are JSON of a schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict

from tests.integration.gateways import Gateway, write_run
from tests.integration.processes import Commands

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
ASKED: list[Any] = [{"role": "user", "content": "as JSON"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "drug": {"enum": ["aspirin", "none"]},
        "dose": {"type": "integer", "minimum": 0, "maximum": 500},
        "days": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 2},
    },
    "required": ["drug", "dose", "days"],
    "additionalProperties": False,
}


def of_schema(schema: Any = SCHEMA, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "found", "schema": schema, **more}}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    run = write_run(tmp_path_factory.mktemp("federation"), byte_level=True)
    commands = Commands(tmp_path_factory.mktemp("gateway"))
    yield Gateway(commands, run)
    commands.end()


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> OpenAI:
    return gateway.client()


def chat(client: OpenAI, **how: Any) -> Any:
    settings = {"model": "run", "messages": ASKED, "max_tokens": 400, "response_format": of_schema()} | how
    return client.chat.completions.create(**settings)


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0},
        {"temperature": 2, "seed": 3, "n": 4},
        {"top_p": 0.3, "presence_penalty": 2, "frequency_penalty": 1},
        {"logit_bias": {"5": 100, "2": 100}, "response_format": of_schema(strict=True)},
        {"logprobs": True, "top_logprobs": 2},
    ],
    ids=str,
)
def test_answers_are_of_the_schema(how: dict[str, Any], client: OpenAI) -> None:
    answer = chat(client, **how)
    assert len(answer.choices) == how.get("n", 1)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        if "logprobs" in how:
            assert len(choice.logprobs.content) == answer.usage.completion_tokens


def test_streams_completions_and_seeds(client: OpenAI) -> None:
    whole = chat(client, seed=4).choices[0].message.content
    chunks = list(chat(client, seed=4, stream=True))
    assert len(chunks) > 5
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    plain = client.completions.create(
        model="run", prompt=["a", "b"], max_tokens=400, extra_body={"response_format": of_schema()}
    )
    for choice in plain.choices:
        jsonschema.validate(json.loads(choice.text), SCHEMA)


def test_a_typed_answer(client: OpenAI) -> None:
    """The client's own helper writes a strict schema and reads the answer."""

    class Found(BaseModel):
        model_config = ConfigDict(extra="forbid")
        kind: Literal["a", "b"]
        certain: bool
        other: bool | None

    answer = client.chat.completions.parse(
        model="run", messages=ASKED, response_format=Found, max_tokens=400, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Found)


def test_any_object_and_what_is_cut_off(client: OpenAI) -> None:
    answer = chat(client, response_format={"type": "json_object"}, logit_bias={"128": 100}, max_tokens=120)
    assert answer.choices[0].message.content.startswith("{")
    cut = chat(client, max_tokens=5).choices[0]
    assert cut.finish_reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut.message.content)
    stopped = chat(client, stop='"dose', response_format=of_schema()).choices[0]
    assert '"dose' not in stopped.message.content
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"type": "xml"}, "response_format"),
        ({"type": "json_schema"}, "response_format.json_schema.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.json_schema.schema"),
        (of_schema(name="with blanks"), "response_format.json_schema.json_schema.name"),
        (of_schema([1]), "response_format.json_schema.json_schema.schema"),
        (of_schema(other=1), "response_format.json_schema.json_schema.other"),
        ({"type": "json_object", "schema": {}}, "response_format.json_object.schema"),
        ("json_object", "response_format"),
        (of_schema({"type": "SECRET"}), "response_format"),
        (of_schema({"type": "string", "pattern": "(SECRET"}), "response_format"),
        (of_schema({"type": "integer", "multipleOf": 999_983}), "response_format"),
        (of_schema({"enum": ["x" * 70_000]}), "response_format"),
    ],
    ids=range(12),
)
def test_bad_formats(form: Any, param: str, gateway: Gateway, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        chat(client, response_format=form)
    assert (found.value.param, found.value.type) == (param, "invalid_request_error")
    assert "SECRET" not in gateway.log


def test_a_schema_that_takes_long_holds_nobody_up(client: OpenAI) -> None:
    """Answers are written while two of them are compiled."""
    with ThreadPoolExecutor(2) as threads:
        slow = [
            threads.submit(chat, client, response_format=of_schema({"type": "integer", "multipleOf": 999_900 + step}))
            for step in (1, 3)
        ]
        assert chat(client, response_format={"type": "text"}, max_tokens=3).usage.completion_tokens == 3
        assert not all(one.done() for one in slow)
        assert all(isinstance(one.exception(), openai.BadRequestError) for one in slow)


def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused(commands: Commands, tmp_path: Path) -> None:
    client = Gateway(commands, write_run(tmp_path / "words")).client()
    with pytest.raises(openai.BadRequestError, match="leave out response_format") as found:
        client.chat.completions.create(
            model="run", messages=[{"role": "user", "content": "w4"}], response_format={"type": "json_object"}
        )
    assert (found.value.param, found.value.code) == ("response_format", "unsupported")
