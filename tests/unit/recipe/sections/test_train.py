"""``[train]``: its checks, and how far so many steps go."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.recipe import TrainSection
from tests.unit.recipe.refusals import OUT, Case, assert_mended, changed, least, name_of, refused

REFUSED: list[Case] = [
    (
        {"train.momentum": 0.9},
        "train.momentum: 'adamw' has its own averages",
        "set train.optimizer = 'sgd'",
        {"train.optimizer": "sgd"},
    ),
    ({"train.momentum": 0.9}, "train.momentum", "leave momentum out", {"train.momentum": OUT}),
    (
        {"train.optimizer": "sgd", "train.learning_rate": 0.1, "train.proximal": 10.0},
        "train.proximal: with a learning rate of 0.1",
        "less than 10",
        {"train.proximal": 9.9},
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_impossible_steps_are_refused(case: Case) -> None:
    assert_mended(case)


def test_by_default_steps_are_the_optimizers_alone() -> None:
    train = TrainSection()
    assert (train.momentum, train.proximal, train.sharpness) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("proximal", value) for value in (-1e-9, -1.0, math.nan, math.inf, "0.1", True)],
        *[("sharpness", value) for value in (-0.05, math.nan, -math.inf, "much", False)],
        *[("momentum", value) for value in (-0.1, 1.0, 1.5, math.nan)],
    ],
)
def test_a_wrong_value_names_its_key(key: str, value: Any) -> None:
    error = refused(changed(least(), {f"train.{key}": value}))
    assert error.message.startswith(f"train.{key} = ")
    assert error.remedy == f"correct the value of train.{key}"


@given(st.integers(1, 60), st.floats(1e-4, 0.5), st.floats(1e-3, 0.99))
def test_steps_reach_as_far_as_fednova_says(steps: int, rate: float, shrinks: float) -> None:
    """Under a pull, so far from its start as a silo goes by a gradient of one; else one a step."""
    pulled = TrainSection(optimizer="sgd", learning_rate=rate, proximal=shrinks / rate)
    w = 0.0
    for _ in range(steps):
        w -= rate * (1.0 + pulled.proximal * w)
    assert pulled.reach(steps) == pytest.approx(-w / rate, rel=1e-6)
    for other in (TrainSection(proximal=5.0), TrainSection(optimizer="sgd", momentum=0.9, proximal=5.0)):
        assert other.reach(steps) == steps
    assert TrainSection(optimizer="sgd").reach(steps) == steps
