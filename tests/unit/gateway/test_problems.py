"""Errors in OpenAI's shape."""

from __future__ import annotations

import inspect
import json

import pytest

from isthmus import errors
from isthmus.errors import IsthmusError
from isthmus.gateway.problems import Problem, problem_of

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, IsthmusError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_an_answer(kind: type[IsthmusError]) -> None:
    problem = problem_of(kind("it broke", remedy="mend it"), {"x-own": "1"})
    assert problem.status in (400, 429, 503)
    assert problem.headers["x-own"] == "1"
    assert problem.body()["error"].keys() == {"message", "type", "param", "code"}
    assert "it broke" in problem.message
    assert "mend it" in problem.message


def test_a_spent_budget_is_not_tried_again_and_a_busy_gateway_is() -> None:
    spent = problem_of(errors.BudgetExhausted("spent", remedy="stop"))
    assert (spent.status, spent.code, spent.headers) == (429, "privacy_budget_exhausted", {"x-should-retry": "false"})
    busy = problem_of(errors.BusyError("busy", remedy="wait"))
    assert (busy.status, busy.headers) == (503, {"retry-after": "2"})


def test_what_cannot_be_written_is_replaced() -> None:
    body = Problem(400, "bad \ud800", param="\ud800").body()
    assert json.dumps(body, ensure_ascii=False).encode()
    assert body["error"]["param"] == "?"
