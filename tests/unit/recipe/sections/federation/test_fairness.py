"""``[federation.fairness]``: wrong values."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.recipe.refusals import changed, least, refused


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("minimax", "kind"),
        ({"strength": 0.0}, "strength"),
        ({"reference": 0.0}, "reference"),
        ({"bound": 0.5}, "bound"),
    ],
)
def test_a_wrong_value_names_its_key(value: Any, key: str) -> None:
    error = refused(changed(least(), {"federation.fairness": value}))
    assert error.message.startswith(f"federation.fairness.{key} = ")
