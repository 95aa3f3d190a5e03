"""Noise shares of a sum: as much as the loss asks for, whatever the silos; what it costs, and who is believed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import RecipeError
from isthmus.privacy.analytic import concentrated_epsilon
from isthmus.privacy.distributed_gaussian import (
    SumNoise,
    fewest_honest_silos,
    loss_of,
    rounded,
    smallest_deviation,
    sum_noise,
    without_noise,
)
from isthmus.recipe import Recipe
from tests.conftest import make_recipe

SILOS = ("a", "b", "c", "d")


def recipe_of(noise: dict[str, Any], **federation: Any) -> Recipe:
    values = {"secure": True, "weights": "equal", "noise": noise, "clip": {"norm": 1.0}, **federation}
    return make_recipe(Path("none"), silos=SILOS, federation=values, root={"minimum": 3}, train={"rounds": 5})


@given(st.floats(1e-3, 2.0), st.floats(1.0, 1e4), st.integers(1, 10_000), st.integers(1, 20))
def test_the_smallest_deviation_keeps_to_its_loss(loss: float, bound: float, count: int, honest: int) -> None:
    deviation = smallest_deviation(loss, bound, count, honest)
    assert loss_of(deviation, bound, count, honest) <= loss
    if deviation > 0.5:
        assert loss_of(deviation * (1 - 1e-6), bound, count, honest) > loss


def test_alone_it_is_the_gaussian_loss() -> None:
    assert loss_of(4.0, 2.0, 100, 1) == pytest.approx((2 * 2.0 / 4.0) ** 2 / 2)


def test_more_honest_silos_need_less_noise_each() -> None:
    shares = [SumNoise(honest, 0.1).update(1000, 50).deviation for honest in (1, 2, 4)]
    assert shares[0] > shares[1] > shares[2]
    assert shares[0] == pytest.approx(shares[2] * 2, rel=0.01)


@given(st.floats(0, 1e5), st.integers(1, 10_000))
def test_rounding_lengthens_by_a_step_a_number_at_most(norm: float, count: int) -> None:
    assert norm <= rounded(norm, count) + 1e-9 <= norm + math.sqrt(count) + 1e-6


def test_a_rounds_loss_is_its_part_of_the_recipes_epsilon() -> None:
    noise = sum_noise(recipe_of({"epsilon": 8.0}))
    assert noise is not None
    assert concentrated_epsilon(5 * noise.loss, 1e-5) == pytest.approx(8.0, rel=1e-6)
    assert (noise.honest, noise.norms, noise.central) == (3, 0.0, False)
    assert sum_noise(recipe_of({"multiplier": 2.0})) == SumNoise(3, 2 / 2.0**2)


def test_who_colludes_is_not_counted_and_the_root_draws_alone() -> None:
    assert fewest_honest_silos(recipe_of({"epsilon": 8.0, "colluding": 1})) == 2
    central = recipe_of({"epsilon": 8.0, "where": "root"})
    assert fewest_honest_silos(central) == 1
    noise = sum_noise(central)
    assert noise is not None
    assert noise.reach(100, 10, 4) == 0, "silos add none"


def test_a_recipe_without_noise_has_none() -> None:
    assert sum_noise(make_recipe(Path("none"), silos=SILOS)) is None


def test_its_event_is_of_the_whole_sum_and_unbounded_to_who_draws() -> None:
    share = SumNoise(4, 0.1).update(1000, 50)
    event = share.event("update", 2, 50, 1.0, 0.001)
    assert (event.mechanism, event.honest, event.charges[0].concentrated) == ("summed", 4, share.loss)
    assert event.noise == pytest.approx(share.deviation * 2 * 0.001)
    assert not without_noise(event).charges[0].bounded


def test_noise_without_a_clip_is_refused() -> None:
    with pytest.raises(RecipeError, match="clip"):
        recipe_of({"epsilon": 8.0}, clip=None)
