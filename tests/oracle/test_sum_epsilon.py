"""What noise in a sum costs, against divergences summed up number by number and against dp-accounting."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from isthmus.privacy.accountant import Account
from isthmus.privacy.analytic import concentrated_epsilon, concentrated_loss
from isthmus.privacy.distributed_gaussian import SumNoise, loss_of, round_loss, rounded, smallest_deviation, sum_noise
from isthmus.privacy.events import ALL, Charge
from isthmus.recipe import NoiseSection, Recipe
from tests.conftest import make_recipe

ORDERS = (1.01, 1.5, 2.0, 4.0, 16.0)
WIDEST = 120
"""Well beyond where divergences of these orders are made up."""


def recipe(noise: dict[str, Any], clip: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    federation = {"secure": True, "weights": "equal", "noise": noise, "clip": clip or {"norm": 1.0}}
    return make_recipe(Path("model"), silos=tuple("abcde"), federation=federation, **sections)


def log_pmf(deviation: float, silos: int) -> np.ndarray:
    """Of the sum of so many silos' discrete Gaussian draws from -WIDEST to WIDEST: logarithms, convolved."""
    sizes = np.arange(-WIDEST, WIDEST + 1)
    one = -(sizes.astype(float) ** 2) / (2 * deviation**2)
    one -= logsumexp(one)
    rest = sizes[:, None] - sizes[None, :]  # what the others add
    total = one
    for _ in range(silos - 1):
        there = abs(rest) <= WIDEST
        terms = np.where(there, one[np.where(there, rest + WIDEST, 0)], -np.inf)
        total = logsumexp(terms + total[None, :], axis=1)
    return total


def divergence(log_p: np.ndarray, shift: int, order: float) -> float:
    """Rényi's, of a distribution and itself shifted, from the definition."""
    p, q = log_p[shift:], log_p[: len(log_p) - shift]
    return float(logsumexp(order * p + (1 - order) * q)) / (order - 1)


@pytest.mark.parametrize("silos", [1, 2, 3, 6])
@pytest.mark.parametrize("deviation", [0.5, 0.6, 0.8, 1.5])
@pytest.mark.parametrize("bound", [1.0, 2.0])
def test_the_loss_bounds_the_divergence_of_the_sum(silos: int, deviation: float, bound: float) -> None:
    """One number of either side of the bound: the sum's own distribution, convolved."""
    total, loss = log_pmf(deviation, silos), loss_of(deviation, bound, 1, silos)
    for order in ORDERS:
        assert divergence(total, int(2 * bound), order) <= order * loss * (1 + 1e-6)
    exact = (2 * bound) ** 2 / (2 * silos * deviation**2)
    assert loss >= exact
    if deviation > 1:
        assert loss == pytest.approx(exact, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-4, 5.0), st.floats(1.0, 1e5), st.integers(1, 500_000), st.integers(1, 60))
def test_noise_is_the_smallest_that_keeps_to_a_loss(loss: float, bound: float, count: int, honest: int) -> None:
    deviation = smallest_deviation(loss, bound, count, honest)
    assert loss_of(deviation, bound, count, honest) <= loss
    assert deviation == 0.5 or loss_of(deviation * (1 - 1e-6), bound, count, honest) > loss


@settings(deadline=None, max_examples=40)
@given(st.floats(0.3, 30.0), st.integers(1, 200), st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_epsilon_of_rounds_is_dp_accountings(multiplier: float, rounds: int, delta: float) -> None:
    """Without rounding ρ is the Gaussian mechanism's, which dp-accounting composes by Rényi orders of its own."""
    loss = round_loss(NoiseSection(multiplier=multiplier), rounds, delta)
    account = Account()
    for _ in range(rounds):
        account = account.plus(Charge(ALL, concentrated=loss))
    independent = dp_accounting.rdp.RdpAccountant(
        np.concatenate([np.linspace(1.01, 20, 400), np.geomspace(20, 1e4, 400)])
    )
    independent.compose(dp_accounting.GaussianDpEvent(multiplier / 2), rounds)
    found = account.epsilon(delta)
    assert found.value == pytest.approx(independent.get_epsilon(delta), rel=0.01, abs=1e-4)
    assert found.method == "rdp"
    exact = dp_accounting.get_epsilon_gaussian(multiplier / (2 * math.sqrt(rounds)), delta)
    assert exact <= found.value * (1 + 1e-6)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.1, 40.0), st.integers(1, 60), st.floats(1e-8, 1e-3))
def test_noise_for_an_epsilon_keeps_to_it_in_all_rounds(epsilon: float, rounds: int, delta: float) -> None:
    made = recipe(
        {"epsilon": epsilon}, {"norm": 1.0, "quantile": 0.5}, privacy={"delta": delta}, train={"rounds": rounds}
    )
    noise = sum_noise(made)
    assert noise is not None
    account = Account()
    for _ in range(rounds):
        account = account.plus(Charge(ALL, concentrated=noise.update(32767, 4000).loss))
        account = account.plus(Charge(ALL, concentrated=noise.norm(32767).loss))
    assert epsilon * 0.999 <= account.epsilon(delta).value <= epsilon * (1 + 1e-6)
    assert account.within(epsilon, delta)
    assert not account.plus(Charge(ALL, concentrated=noise.loss)).within(epsilon, delta)


@pytest.mark.parametrize("deviation", [3.0, 10.0, 40.0])
def test_epsilon_is_no_smaller_than_the_discrete_gaussians_own_losses_allow(deviation: float) -> None:
    """dp-accounting tabulates the losses of one number with a sensitivity of 1."""
    table = privacy_loss_distribution.from_discrete_gaussian_mechanism(deviation, sensitivity=2)
    for delta in (1e-3, 1e-6):
        mine = concentrated_epsilon(loss_of(deviation, 1.0, 1, 1), delta)
        assert table.get_epsilon_for_delta(delta) <= mine * 1.001
        assert mine <= table.get_epsilon_for_delta(delta) * 1.35 + 0.02


def test_gaussian_and_concentrated_charges_compose_by_divergences() -> None:
    account = Account().plus(Charge("a", 0.5)).plus(Charge("a", concentrated=0.25))
    assert account.epsilon(1e-5).value == pytest.approx(concentrated_epsilon(0.5, 1e-5))
    mixed = account.plus(Charge("a", pure=0.3))
    assert concentrated_epsilon(0.5, 1e-5) < mixed.epsilon(1e-5).value <= concentrated_epsilon(0.5, 1e-5) + 0.3
    assert not Account().plus(Charge("a", concentrated=math.inf)).bounded


def test_an_epsilon_and_its_loss_are_each_others() -> None:
    for epsilon in (0.01, 1.0, 8.0, 300.0):
        loss = concentrated_loss(epsilon, 1e-6)
        assert epsilon * (1 - 1e-6) <= concentrated_epsilon(loss, 1e-6) <= epsilon


# --- how the recipe's words become noise


def test_a_rounded_vector_is_within_the_bound_more_often_than_not() -> None:
    draw = np.random.default_rng(0)
    for norm, count in ((3.0, 1), (5.0, 400), (127.0, 4000), (30_000.0, 1000)):
        vector = draw.standard_normal(count)
        vector *= norm / np.linalg.norm(vector)
        lengths = [np.linalg.norm(np.floor(vector + draw.random(count))) for _ in range(300)]
        assert rounded(norm, count) >= norm
        assert np.mean(np.array(lengths) <= rounded(norm, count)) > 1 - math.exp(-0.5)
        assert max(lengths) <= norm + math.sqrt(count)


def test_the_multiplier_is_the_sums_deviation_in_clips() -> None:
    """With many levels rounding costs next to nothing; with few it is made up for."""
    noise = sum_noise(recipe({"multiplier": 3.0}))
    assert noise is not None
    assert noise.honest == 5
    share = noise.update(32767, 1000)
    assert share.deviation * math.sqrt(5) / 32767 == pytest.approx(3.0, rel=1e-3)
    assert share.loss == pytest.approx(2 / 9, rel=1e-6)
    few = noise.update(7, 1000)
    assert few.deviation * math.sqrt(5) / 7 > 2 * 3.0
    assert few.loss == pytest.approx(2 / 9, rel=1e-6)


@pytest.mark.parametrize(("minimum", "colluding", "honest"), [(None, 0, 5), (4, 0, 4), (3, 1, 2), (4, 3, 1)])
def test_each_share_suffices_for_the_fewest_honest_survivors(minimum: int | None, colluding: int, honest: int) -> None:
    sections = {"root": {"minimum": minimum}} if minimum else {}
    noise = sum_noise(recipe({"multiplier": 2.0, "colluding": colluding}, **sections))
    assert noise is not None
    assert noise.honest == honest
    assert noise.update(32767, 100).deviation * math.sqrt(honest) >= 2.0 * 32767


def test_the_bits_have_their_part_of_a_rounds_loss() -> None:
    whole = SumNoise(3, 0.5)
    parted = SumNoise(3, 0.5, norms=0.2)
    assert whole.update(127, 50).loss == pytest.approx(0.5)
    assert parted.update(127, 50).loss == pytest.approx(0.4)
    assert parted.norm(127).loss == pytest.approx(0.1)
    assert parted.update(127, 50).deviation > whole.update(127, 50).deviation
