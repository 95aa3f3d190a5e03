"""``[federation.compression]``: wrong values, and top-k without feedback."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import CompressionSection
from tests.unit.recipe.refusals import Changes, assert_mended, changed, least, refused


@pytest.mark.parametrize(
    ("key", "value"), [("kind", "zip"), ("keep", 0.0), ("keep", 1.5), ("bits", 1), ("bits", 33), ("feedback", 1)]
)
def test_a_wrong_value_names_its_key(key: str, value: Any) -> None:
    error = refused(changed(least(), {f"federation.compression.{key}": value}))
    assert error.message.startswith(f"federation.compression.{key} = ")


@pytest.mark.parametrize(
    "mended", [{"federation.compression.feedback": True}, {"federation.compression.kind": "random-k"}], ids=str
)
def test_top_k_without_feedback_is_refused(mended: Changes) -> None:
    asked = {"federation.compression": {"kind": "top-k", "feedback": False}}
    reason = "federation.compression.feedback: without it, numbers that are never among the largest are never sent"
    assert_mended((asked, reason, "feedback = true", mended))


@pytest.mark.parametrize(
    ("values", "exact"),
    [({}, True), ({"keep": 0.5}, True), ({"kind": "sketch"}, False), ({"bits": 16}, False)],
    ids=str,
)
def test_updates_cross_in_full_unless_something_is_left_out(values: dict[str, Any], exact: bool) -> None:
    assert CompressionSection.model_validate(values).exact == exact
