"""Canaries: seen often they are exposed, never seen they are not; ranks against plain counting."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.attacks.membership.canaries import draw_canary, exposure, insert_canary
from isthmus.errors import DataError
from tests.unit.attacks.membership.overfit import losses, trained

ALPHABET = [str(number) for number in range(20, 30)]
CANARY = draw_canary("5 6 7 {secret} 8", ALPHABET, 3, seed=1)


def ids(text: str) -> list[int]:
    return [int(word) for word in text.split()]


@pytest.mark.parametrize(("times", "low", "high"), [(20, 8.0, math.log2(1000)), (0, 0.0, 4.0)])
def test_exposure_follows_how_often_it_was_seen(tiny: Path, times: int, low: float, high: float) -> None:
    draw = random.Random(3)
    rows = [[5, 6, 7, *draw.choices(range(20, 30), k=3), 8] for _ in range(20)]
    model = trained(tiny, insert_canary(rows, ids(CANARY.filled()), times), steps=40)
    (own,) = losses(model, [ids(CANARY.filled())])
    others = losses(model, [ids(CANARY.filled(other)) for other in CANARY.others(CANARY.space)])
    assert low <= exposure(own, others, CANARY.space) <= high
    sample = losses(model, [ids(CANARY.filled(other)) for other in CANARY.others(200)])
    assert exposure(own, sample, CANARY.space) == pytest.approx(exposure(own, others, CANARY.space), abs=2.5)


def test_noise_hides_a_canary(tiny: Path) -> None:
    rows = [ids(CANARY.filled(other)) for other in CANARY.others(20, seed=9)]
    model = trained(tiny, insert_canary(rows, ids(CANARY.filled()), 20), steps=40, noise=200.0)
    (own,) = losses(model, [ids(CANARY.filled())])
    others = losses(model, [ids(CANARY.filled(other)) for other in CANARY.others(CANARY.space)])
    assert exposure(own, others, CANARY.space) < 4


def test_others_are_all_other_secrets_or_distinct_ones() -> None:
    small = draw_canary("a {secret}", "xyz", 2, seed=0, separator="")
    every = small.others(small.space)
    assert len(set(every)) == 8
    assert small.secret not in every
    some = CANARY.others(50)
    assert len(set(some)) == 50
    assert CANARY.secret not in some
    assert some == CANARY.others(50)
    assert small.filled(("x", "y")) == "a xy"


def test_planting_keeps_every_row() -> None:
    mixed = insert_canary(["a", "b", "c"], "canary", 2)
    assert sorted(mixed) == ["a", "b", "c", "canary", "canary"]
    assert mixed != ["a", "b", "c", "canary", "canary"]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_with_all_other_secrets_the_rank_is_exact(others: list[int], own: int) -> None:
    rank = sorted([*others, own]).index(own) + 1
    assert exposure(own, others, len(others) + 1) == pytest.approx(math.log2((len(others) + 1) / rank))


def test_unusable_input_is_named() -> None:
    with pytest.raises(DataError, match="without a secret"):
        draw_canary("no gap", "ab", 2, seed=0)
    with pytest.raises(DataError, match="other losses"):
        exposure(1.0, [1.0, 2.0], 2)
    with pytest.raises(DataError, match="other losses"):
        exposure(float("nan"), [1.0], 4)
