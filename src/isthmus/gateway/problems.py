"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isthmus.errors import (
    BudgetExhausted,
    BusyError,
    DataError,
    FrameError,
    IsthmusError,
    ModelError,
    NotSupportedError,
    PeerGoneError,
)

INVALID = "invalid_request_error"
ANSWERED_WITH: tuple[tuple[type[IsthmusError], int, str, str | None], ...] = (
    (BudgetExhausted, 429, "insufficient_quota", "privacy_budget_exhausted"),
    (BusyError, 503, "server_busy", "server_busy"),
    (DataError, 400, INVALID, None),
    (NotSupportedError, 400, INVALID, "unsupported"),
    (FrameError, 400, INVALID, "request_too_large"),
    (ModelError, 400, INVALID, "unsupported_model"),
    (PeerGoneError, 503, "trunk_unavailable", "trunk_unavailable"),
)
"""HTTP status, type and code of an error; of all others 503. The trunk refuses with ``FrameError`` what is too long for
its memory."""
FINAL = {"x-should-retry": "false"}
"""Header by which OpenAI's clients do not try again."""
SOON = {"retry-after": "2"}


class Problem(Exception):  # noqa: N818 (an answer, as HTTP's problem details)
    """An answer of the gateway that is an error.

    Args:
        param: the argument that it is about.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.message, self.type, self.param, self.code = message, type, param, code

    def body(self) -> dict[str, Any]:
        """For JSON. Halves of surrogate pairs, which no answer can hold, become "?"."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": {key: None if one is None else _valid(one) for key, one in error.items()}}


def problem_of(error: IsthmusError, headers: Mapping[str, str] | None = None) -> Problem:
    """An error of isthmus as an answer.

    Args:
        headers: further ones.
    """
    known = (one[1:] for one in ANSWERED_WITH if isinstance(error, one[0]))
    status, kind, code = next(known, (503, "server_error", error.code))
    retry = FINAL if isinstance(error, BudgetExhausted) else SOON if status == 503 else {}
    message = f"{error.message}. Remedy: {error.remedy}."
    return Problem(status, message, type=kind, code=code, headers={**retry, **(headers or {})})


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
