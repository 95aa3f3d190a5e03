"""``[federation.asynchronous]``: wrong values."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.recipe.refusals import changed, least, refused


@pytest.mark.parametrize(
    ("key", "value"), [("buffer", 0), ("buffer", -1), ("buffer", 1.5), ("staleness", -1), ("staleness", 0.5)]
)
def test_a_wrong_value_names_its_key(key: str, value: Any) -> None:
    error = refused(changed(least(), {f"federation.asynchronous.{key}": value}))
    assert error.message.startswith(f"federation.asynchronous.{key} = ")
