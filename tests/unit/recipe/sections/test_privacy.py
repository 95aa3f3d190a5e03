"""``[privacy]``: budgets that mean something."""

from __future__ import annotations

import pytest

from tests.unit.recipe.refusals import changed, least, refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("delta", delta) for delta in (0.0, 1.0, -1e-5, float("nan"))],
        *[(key, value) for key in ("record_epsilon", "silo_epsilon") for value in (0.0, -1.0)],
    ],
)
def test_an_epsilon_or_delta_that_means_nothing(key: str, value: float) -> None:
    error = refused(changed(least(), {f"privacy.{key}": value}))
    assert error.message.startswith(f"privacy.{key} = ")
    assert error.remedy == f"correct the value of privacy.{key}"
