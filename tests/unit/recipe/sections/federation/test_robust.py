"""``[federation.robust]``: wrong values, and how many contributions a rule needs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from isthmus.recipe import RobustSection
from tests.unit.recipe.refusals import changed, least, refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rule", "krumm"),
        ("malicious", 0.0),
        ("malicious", 0.5),
        ("malicious", math.nan),
        ("mix", 1),
        ("trusted", "North"),
    ],
)
def test_a_wrong_value_names_its_key(key: str, value: Any) -> None:
    error = refused(changed(least(), {f"federation.robust.{key}": value}))
    assert error.message.startswith(f"federation.robust.{key} = ")


@pytest.mark.parametrize(
    ("values", "count", "faults", "fewest"),
    [
        ({"rule": "mean"}, 9, 1, 1),
        ({"rule": "median"}, 9, 1, 3),
        ({"rule": "median"}, 10, 2, 5),
        ({"rule": "krum"}, 10, 2, 7),
        ({"rule": "bulyan"}, 10, 2, 11),
        ({"rule": "mean", "mix": True}, 10, 2, 5),
        ({"rule": "krum", "mix": True}, 10, 2, 7),
        ({"rule": "fltrust", "trusted": "a"}, 10, 2, 1),
        ({"rule": "median", "malicious": 0.29}, 100, 29, 59),
        ({"rule": "median", "malicious": 0.3}, 10, 3, 7),
    ],
    ids=str,
)
def test_how_many_a_rule_needs(values: dict[str, Any], count: int, faults: int, fewest: int) -> None:
    section = RobustSection.model_validate(values)
    assert (section.faults(count), section.fewest(count)) == (faults, fewest)


@pytest.mark.parametrize(
    ("values", "active"), [({}, False), ({"malicious": 0.4}, False), ({"rule": "median"}, True), ({"mix": True}, True)]
)
def test_a_rule_or_mixing_makes_it_active(values: dict[str, Any], active: bool) -> None:
    assert RobustSection.model_validate(values).active == active
