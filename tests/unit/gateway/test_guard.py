"""What stands before the endpoints."""

from __future__ import annotations

import logging

import pytest
from starlette.types import Receive, Scope, Send

from isthmus.gateway.api_keys import ApiKeys
from isthmus.gateway.guard import OWNER, GatewayGuard, is_own_name
from tests.unit.gateway.asgi import call

KEY = "a-key-that-is-long-enough"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    message = await receive()
    if message["body"] == b"fail":
        raise RuntimeError("a text that a patient wrote")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


OPEN, KEYED = GatewayGuard(echo, None, largest=100), GatewayGuard(echo, ApiKeys([KEY]), largest=100)


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("localhost", True),
        ("LOCALHOST.", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
    ],
)
def test_names_of_this_machine(host: str, own: bool) -> None:
    assert is_own_name(host) == own
    if ":" not in host or host.startswith("["):
        for port in ("", ":8000"):
            assert (call(OPEN, "GET", "/v1/models", headers={"host": host + port}).status == 200) == own


def test_keys_are_asked_for_where_there_are_any() -> None:
    for path in ("/v1/models", "/v1", "/v1x"):
        assert call(KEYED, "GET", path).status == 401
        assert (
            call(KEYED, "GET", path, headers={"authorization": f"Bearer {KEY}", "host": "silo.example"}).status == 200
        )
    assert call(KEYED, "GET", "/healthz").status == 200
    refused = call(KEYED, "POST", "/v1/completions", b"{}", {"authorization": "Bearer wrong"})
    assert (refused.json["error"]["code"], refused.headers["www-authenticate"]) == ("invalid_api_key", "Bearer")


@pytest.mark.parametrize("pieces", [1, 3, 50])
def test_bodies_are_whole_and_bounded(pieces: int) -> None:
    assert call(OPEN, "POST", "/v1/completions", b"x" * 100, pieces=pieces).body == b"x" * 100
    large = call(OPEN, "POST", "/v1/completions", b"x" * 101, pieces=pieces)
    assert (large.status, large.json["error"]["code"]) == (413, "request_too_large")
    assert call(OPEN, "POST", "/v1/completions", b"x" * 2000, pieces=pieces).status == 413


@pytest.mark.parametrize("kind", ["", "text/plain", "multipart/form-data", "application/jsonx"])
def test_only_json_is_taken(kind: str) -> None:
    """What a page in a browser sends without asking first is none."""
    assert call(OPEN, "POST", "/v1/completions", b"{}", {"content-type": kind}).status == 415
    assert (
        call(OPEN, "POST", "/v1/completions", b"{}", {"content-type": "application/json; charset=utf-8"}).status == 200
    )


def test_what_nobody_expected_is_an_answer_and_its_message_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    failed = call(OPEN, "POST", "/v1/completions", b"fail")
    assert (failed.status, failed.json["error"]["type"]) == (500, "server_error")
    assert "RuntimeError in" in caplog.text
    assert "test_guard.py" in caplog.text
    assert "patient" not in caplog.text + failed.body.decode()


def test_the_log_names_known_paths_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    call(OPEN, "GET", "/v1/models")
    call(OPEN, "GET", "/v1/models/SecretName")
    assert "GET /v1/models: 200" in caplog.text
    assert "GET another path: 200" in caplog.text
    assert "Secret" not in caplog.text


def test_requests_say_whose_they_are() -> None:
    """By the number of the key; a client's own headers say nothing of it."""
    seen: list[int] = []

    async def noted(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["state"][OWNER])
        await echo(scope, receive, send)

    other = "another-key-long-enough"
    keyed = GatewayGuard(noted, ApiKeys([KEY, other]))
    for key in (KEY, other, KEY):
        call(keyed, "POST", "/v1/completions", b"{}", {"authorization": f"Bearer {key}", OWNER: "2"})
    call(GatewayGuard(noted, None), "POST", "/v1/completions", b"{}")
    assert seen == [1, 2, 1, 0]
