"""What a gateway counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from isthmus.gateway.api_keys import ApiKeys
from isthmus.gateway.batcher import Batcher
from isthmus.gateway.guard import GatewayGuard
from isthmus.gateway.metrics import GatewayMetrics
from tests.conftest import Split, make_recipe, save_tiny_model
from tests.unit.gateway.asgi import call
from tests.unit.gateway.served import served

CANARY = "w17 w23 w5"
ENDLESS = {"2": -100}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 3}


@pytest.fixture
def gateway(split: Split, tmp_path: Path) -> Iterator[tuple[FastAPI, Batcher]]:
    model, _ = split(make_recipe(save_tiny_model("llama", tmp_path / "model")))
    with served(model, tmp_path / "model") as found:
        yield found


def values(text: str) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(text)
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_answers_are_counted_streamed_or_not(gateway: tuple[FastAPI, Batcher]) -> None:
    app, _ = gateway
    whole = call(app, "POST", "/v1/chat/completions", CHAT | {"logit_bias": ENDLESS})
    streamed = call(app, "POST", "/v1/chat/completions", CHAT | {"stream": True, "logit_bias": ENDLESS})
    assert streamed.status == 200
    told = call(app, "GET", "/metrics")
    assert told.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = values(told.body.decode())
    usage = whole.json["usage"]
    assert found["isthmus_gateway_tokens_total", "prompt"] == 2 * usage["prompt_tokens"]
    assert found["isthmus_gateway_tokens_total", "written"] == 6
    assert found["isthmus_gateway_releases_total",] == 2 * int(whole.headers["x-isthmus-releases"])
    assert found["isthmus_gateway_connected",] == 1
    assert found["isthmus_gateway_running",] == found["isthmus_gateway_waiting",] == 0
    assert not [word for word in CANARY.split() if word in told.body.decode()]


def test_requests_are_counted_by_known_paths_alone(gateway: tuple[FastAPI, Batcher]) -> None:
    app, batcher = gateway
    metrics = GatewayMetrics(batcher)
    guarded = GatewayGuard(app, None, metrics=metrics)
    call(guarded, "GET", "/v1/models")
    call(guarded, "GET", f"/v1/{CANARY}")
    call(guarded, "POST", "/v1/completions", json.dumps({"x": CANARY}).encode())
    found = values(metrics.page().decode())
    assert found["isthmus_gateway_requests_total", "/v1/models", "200"] == 1
    assert found["isthmus_gateway_requests_total", "another path", "404"] == 1
    assert found["isthmus_gateway_requests_total", "/v1/completions", "400"] == 1
    assert found["isthmus_gateway_request_seconds_count", "/v1/models"] == 1
    assert CANARY.split()[0] not in metrics.page().decode()


def test_where_keys_are_needed_they_are_for_the_metrics_too(gateway: tuple[FastAPI, Batcher]) -> None:
    key = "a-key-that-is-long-enough"
    guarded = GatewayGuard(gateway[0], ApiKeys([key]))
    assert call(guarded, "GET", "/metrics").status == 401
    assert call(guarded, "GET", "/healthz").status == 200
    assert call(guarded, "GET", "/metrics", headers={"authorization": f"Bearer {key}"}).status == 200
