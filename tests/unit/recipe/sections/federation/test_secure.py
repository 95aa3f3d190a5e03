"""``[federation.secure]``: wrong values."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.recipe.refusals import changed, least, refused


@pytest.mark.parametrize(("key", "value"), [("masks", 1), ("masks", "yes"), ("range", 0.0), ("range", float("inf"))])
def test_a_wrong_value_names_its_key(key: str, value: Any) -> None:
    error = refused(changed(least(), {f"federation.secure.{key}": value}))
    assert error.message.startswith(f"federation.secure.{key} = ")
