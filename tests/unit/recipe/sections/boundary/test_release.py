"""``[boundary.forward]`` and its like: mechanisms and the keys that each takes."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import ReleaseSection
from tests.unit.recipe.refusals import OUT, Case, assert_mended, changed, least, name_of, refused

DP = {"mechanism": "dp_gaussian", "clip": 1.0, "epsilon": 2.0, "delta": 1e-5}
METRIC = {"mechanism": "metric", "epsilon": 2.0}
REFUSED: list[Case] = [
    (
        {"boundary.forward": DP | {"clip": 0.0}},
        "boundary.forward.clip: the mechanism 'dp_gaussian' needs it",
        "add clip",
        {"boundary.forward.clip": 1.0},
    ),
    (
        {"boundary.forward": DP | {"noise": 0.1}},
        "boundary.forward.noise: the mechanism 'dp_gaussian' does not",
        "leave noise out",
        {"boundary.forward.noise": OUT},
    ),
    (
        {"boundary.update": {"epsilon": 1.0}},
        "boundary.update.epsilon: the mechanism 'gaussian' does not",
        "leave epsilon out",
        {"boundary.update.epsilon": OUT},
    ),
    (
        {"boundary.gradient": {"mechanism": "metric"}},
        "boundary.gradient.epsilon: the mechanism 'metric' needs it",
        "add epsilon",
        {"boundary.gradient.epsilon": 3.0},
    ),
    (
        {"boundary.gradient": METRIC | {"delta": 0.1}},
        "boundary.gradient.delta: the mechanism 'metric' does not",
        "leave delta out",
        {"boundary.gradient.delta": OUT},
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_keys_of_another_mechanism_are_refused(case: Case) -> None:
    assert_mended(case)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("boundary.forward", DP | {"epsilon": epsilon}) for epsilon in (0.0, -1.0, float("inf"), float("nan"))],
        *[("boundary.gradient", DP | {"delta": delta}) for delta in (0.0, 1.0, -1e-5, 2.0, float("nan"))],
        *[("boundary.update", METRIC | {"epsilon": epsilon}) for epsilon in (0.0, -3.0)],
        ("boundary.forward", DP | {"unit": "silo"}),
        ("boundary.forward", {"mechanism": "laplace"}),
    ],
    ids=str,
)
def test_an_epsilon_or_delta_that_means_nothing(key: str, value: dict[str, Any]) -> None:
    error = refused(changed(least(), {key: value}))
    assert error.message.startswith(f"{key}.")
    assert error.remedy.startswith(f"correct the value of {key}.")


@pytest.mark.parametrize(
    ("values", "bounded"),
    [
        ({}, False),
        ({"noise": 1.0}, False),
        ({"clip": 1.0}, False),
        ({"clip": 1.0, "noise": 0.1}, True),
        (DP, True),
        (METRIC, False),
        (METRIC | {"clip": 1.0}, True),
    ],
    ids=str,
)
def test_what_has_clip_and_noise_is_bounded(values: dict[str, Any], bounded: bool) -> None:
    assert ReleaseSection.model_validate(values).bounded == bounded
