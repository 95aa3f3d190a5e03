"""Closed-form epsilons: each inverse undoes its function, and they agree with published relations."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.privacy.analytic import concentrated_epsilon, concentrated_loss, gaussian_epsilon, gaussian_noise

DELTA = 1e-5


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """Of the Gaussian mechanism with sensitivity 1 (Balle and Wang 2018, theorem 8)."""

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    first = below(1 / (2 * sigma) - epsilon * sigma)
    return first - math.exp(epsilon) * below(-1 / (2 * sigma) - epsilon * sigma)


@pytest.mark.parametrize("charge", [1e-3, 0.1, 1.0, 9.0])
def test_the_gaussian_epsilon_has_its_delta(charge: float) -> None:
    epsilon = gaussian_epsilon(charge, DELTA)
    assert gaussian_delta(charge**-0.5, epsilon) == pytest.approx(DELTA, rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 50))
def test_the_noise_of_an_epsilon_gives_it_back(epsilon: float) -> None:
    assert gaussian_epsilon(gaussian_noise(epsilon, DELTA) ** -2, DELTA) == pytest.approx(epsilon, rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 50))
def test_the_loss_of_an_epsilon_keeps_to_it(epsilon: float) -> None:
    rho = concentrated_loss(epsilon, DELTA)
    assert concentrated_epsilon(rho, DELTA) <= epsilon
    assert concentrated_epsilon(rho * 1.001, DELTA) > epsilon * 0.999


@pytest.mark.parametrize("rho", [1e-3, 0.1, 1.0, 10.0])
def test_concentrated_privacy_costs_no_more_than_by_its_simple_bound(rho: float) -> None:
    """Bun and Steinke 2016, proposition 1.3."""
    assert concentrated_epsilon(rho, DELTA) <= rho + 2 * math.sqrt(rho * math.log(1 / DELTA))


@pytest.mark.parametrize("delta", [0.0, -1.0])
def test_a_delta_of_nothing_is_refused(delta: float) -> None:
    with pytest.raises((ValueError, ZeroDivisionError)):
        concentrated_epsilon(1.0, delta)
