"""What stands before the gateway's endpoints: keys, hosts, sizes of bodies, and errors that nobody expected.

No line of the log holds anything that a client sent.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isthmus.gateway.api_keys import ApiKeys
from isthmus.gateway.metrics import GatewayMetrics
from isthmus.gateway.problems import Problem

log = logging.getLogger(__name__)
LARGEST_BODY = 2 * 2**20
"""Bytes."""
DISCARDED = 16
"""Times the largest body: so much of a larger one is read before it is refused."""
OWNER = "owner"
"""In the state of a request: whose it is."""
KNOWN_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/healthz", "/metrics", "/openapi.json"}
)
"""Paths that the log names."""


class GatewayGuard:
    """An ASGI application around another one.

    Args:
        keys: those that ``/v1`` and ``/metrics`` ask for; None: nobody needs one, and only this machine's names are
            accepted as hosts, so that no page in a browser here can read answers.
        largest: bytes of the largest body.
        metrics: count the requests; None: nothing does.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys | None,
        largest: int = LARGEST_BODY,
        metrics: GatewayMetrics | None = None,
    ) -> None:
        self._app, self._keys, self._largest, self._metrics = app, keys, largest, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def noted_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status) if message["type"] == "http.response.start" else status
            await send(message)

        try:
            scope = {**scope, "state": {**scope.get("state", {}), OWNER: self._check(scope)}}
            await self._app(scope, await self._read_body(scope, receive), noted_send)
        except Problem as problem:
            await _answer(problem, noted_send)
        except Exception as error:  # its message may hold text
            log.error("gateway: %s in %s", type(error).__name__, _place(error))
            if not status:
                await _answer(Problem(500, "an error of the gateway", type="server_error"), noted_send)
        path = scope["path"] if scope["path"] in KNOWN_PATHS else "another path"
        seconds = time.monotonic() - started
        log.info("gateway: %s %s: %s, %.2f s", scope["method"], path, status or "gone", seconds)
        if self._metrics is not None:
            self._metrics.note_request(path, status, seconds)

    def _check(self, scope: Scope) -> int:
        """Whose request it is: the number of the API key; 0 without keys."""
        owner: int | None = 0
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self._keys is None:
            if not is_own_name(re.sub(r":\d*$", "", headers.get("host", ""))):
                raise Problem(403, "without API keys the gateway answers to this machine's own names alone")
        elif scope["path"].startswith(("/v1", "/metrics")):
            owner = self._keys.owner(headers.get("authorization", ""))
        if owner is None:
            raise Problem(
                401,
                "no valid API key: send one of this gateway's as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if (
            scope["method"] == "POST"
            and headers.get("content-type", "").partition(";")[0].strip() != "application/json"
        ):
            raise Problem(415, "the body must be JSON: send 'Content-Type: application/json'")
        return owner

    async def _read_body(self, scope: Scope, receive: Receive) -> Receive:
        """Messages with the whole body first, which is no larger than allowed."""
        body, size, more = bytearray(), 0, scope["method"] in ("POST", "PUT", "PATCH")
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            more, size = message.get("more_body", False), size + len(message.get("body", b""))
            if size <= self._largest:
                body += message.get("body", b"")
            if size > DISCARDED * self._largest:
                break
        if size > self._largest:  # said when all is read: a client that still sends would not see it
            raise Problem(413, f"the body is larger than {self._largest:,} bytes", code="request_too_large")
        given = False

        async def whole() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return whole


def is_own_name(host: str) -> bool:
    """Whether this name or address means the machine itself, and nothing else."""
    if host.lower().removesuffix(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


async def _answer(problem: Problem, send: Send) -> None:
    body = json.dumps(problem.body(), ensure_ascii=False).encode()
    headers: list[tuple[bytes, bytes]] = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in problem.headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _place(error: BaseException) -> str:
    """Where an error arose: file and line alone."""
    trace: Any = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
