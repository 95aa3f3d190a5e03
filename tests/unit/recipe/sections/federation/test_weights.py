"""``[federation.weights]``: wrong values, and which weights silos claim."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import WeightsSection
from tests.unit.recipe.refusals import changed, least, refused


@pytest.mark.parametrize(
    ("value", "key"), [("tokens", "kind"), ({"bound": 0.9}, "bound"), ({"bound": float("inf")}, "bound")]
)
def test_a_wrong_value_names_its_key(value: Any, key: str) -> None:
    error = refused(changed(least(), {"federation.weights": value}))
    assert error.message.startswith(f"federation.weights.{key} = ")


def test_silos_claim_weights_that_the_root_does_not_compute() -> None:
    kinds = ("examples", "equal", "agreement", "inverse-variance", "quality")
    assert [WeightsSection(kind=kind).claimed for kind in kinds] == [True, True, False, False, False]
