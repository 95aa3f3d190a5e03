"""The endpoints and their document."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from isthmus.gateway.batcher import Batcher
from isthmus.gateway.documents import ChatAnswer, CompletionAnswer, ErrorBody, HealthBody, ModelBody, ModelsBody
from isthmus.gateway.requests import ChatBody, CompletionBody
from tests.conftest import Split, make_recipe, save_tiny_model
from tests.unit.gateway.asgi import call
from tests.unit.gateway.served import served

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "w4 w5"}], "max_tokens": 3}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "w4 w5", "max_tokens": 3}


@pytest.fixture
def gateway(split: Split, tmp_path: Path) -> Iterator[tuple[FastAPI, Batcher]]:
    model, _ = split(make_recipe(save_tiny_model("llama", tmp_path / "model")))
    with served(model, tmp_path / "model") as found:
        yield found


def test_answers_are_as_the_document_says(gateway: tuple[FastAPI, Batcher]) -> None:
    app, _ = gateway
    chat = call(app, "POST", "/v1/chat/completions", CHAT | {"logit_bias": {"2": -100}})  # no early end
    ChatAnswer.model_validate(chat.json, strict=True)
    CompletionAnswer.model_validate(call(app, "POST", "/v1/completions", TEXT).json, strict=True)
    ModelsBody.model_validate(call(app, "GET", "/v1/models").json, strict=True)
    ModelBody.model_validate(call(app, "GET", "/v1/models/tiny").json, strict=True)
    HealthBody.model_validate(call(app, "GET", "/healthz").json, strict=True)
    assert chat.headers["x-isthmus-releases"] == "3"
    for method, path, body, status in (
        ("POST", "/v1/chat/completions", CHAT | {"model": "other"}, 404),
        ("POST", "/v1/chat/completions", CHAT | {"x": 1}, 400),
        ("POST", "/v1/completions", TEXT | {"max_tokens": 10_000}, 400),
        ("POST", "/v1/embeddings", {}, 400),
        ("GET", "/v1/models/other", b"", 404),
        ("GET", "/v1/files", b"", 404),
        ("PUT", "/v1/models", b"", 405),
    ):
        refused = call(app, method, path, body)
        assert refused.status == status
        ErrorBody.model_validate(refused.json, strict=True)


def test_the_document_has_each_argument(gateway: tuple[FastAPI, Batcher]) -> None:
    document = call(gateway[0], "GET", "/openapi.json").json
    for kind in (ChatBody, CompletionBody):
        assert set(document["components"]["schemas"][kind.__name__]["properties"]) == set(kind.model_fields)
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/healthz"} <= document["paths"].keys()


def test_a_client_that_leaves_ends_its_request(gateway: tuple[FastAPI, Batcher]) -> None:
    app, batcher = gateway
    endless = {"max_tokens": 500, "logit_bias": {"2": -100}}  # it would end early by chance
    for stream in (False, True):
        gone = call(app, "POST", "/v1/completions", TEXT | endless | {"stream": stream}, leave_after=0.05)
        assert b"[DONE]" not in gone.body
        assert gone.status in (499, 200)
        whole = call(app, "POST", "/v1/completions", TEXT)
        assert whole.status == 200
        assert batcher.load[1] == 0


def test_health_is_that_of_the_connection_to_the_trunk(gateway: tuple[FastAPI, Batcher]) -> None:
    app, batcher = gateway
    assert call(app, "GET", "/healthz").json == {"status": "ok", "running": 0, "waiting": 0}
    batcher.stop()
    while batcher.open:
        time.sleep(0.001)
    assert call(app, "GET", "/healthz").status == 503
    assert call(app, "POST", "/v1/completions", TEXT).json["error"]["code"] == "trunk_unavailable"


def test_sequences_of_several_prompts_are_numbered_by_prompt(gateway: tuple[FastAPI, Batcher]) -> None:
    app, _ = gateway
    several = call(app, "POST", "/v1/completions", TEXT | {"prompt": ["w4 w5", "w6"], "n": 2, "seed": 3}).json
    each = [TEXT | {"prompt": one, "n": 2, "seed": 3} for one in ("w4 w5", "w6")]
    own = [call(app, "POST", "/v1/completions", one).json for one in each]
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in several["choices"]] == [
        choice["text"] for one in own for choice in one["choices"]
    ]
    assert several["privacy"]["releases"] == sum(one["privacy"]["releases"] for one in own)
