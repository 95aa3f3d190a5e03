"""ASGI applications called by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp

JSON = {"content-type": "application/json", "host": "localhost:8000"}


@dataclass
class Answered:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def called(
    app: ASGIApp,
    method: str,
    path: str,
    body: bytes | dict[str, Any] = b"",
    headers: dict[str, str] | None = None,
    *,
    pieces: int = 1,
    leave_after: float | None = None,
) -> Answered:
    """The answer to one request.

    Args:
        pieces: number of messages that the body comes in.
        leave_after: seconds after which the client closes its connection; None: it waits.
    """
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    size = -(-len(data) // pieces) or 1
    parts = [data[start : start + size] for start in range(0, len(data), size)] or [b""]
    found, over = Answered(), asyncio.Event()

    async def receive() -> MutableMapping[str, Any]:
        if parts:
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}
        if leave_after is None:
            await over.wait()
        else:
            await asyncio.sleep(leave_after)
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            found.status = message["status"]
            found.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            found.body += message.get("body", b"")

    given = JSON | (headers or {})
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    try:
        await app(scope, receive, send)
    finally:
        over.set()
    return found


def call(app: ASGIApp, *arguments: Any, **options: Any) -> Answered:
    """``called`` in a loop of its own."""
    return asyncio.run(called(app, *arguments, **options))
