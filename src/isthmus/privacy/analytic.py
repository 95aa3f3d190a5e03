"""Epsilons in one step, by dp-accounting: the Gaussian mechanism's exact one and its noise (Balle and Wang 2018,
theorem 8), and that which follows from concentrated privacy.

Where epsilon is large, its logarithms reach zero on the way to the right answer; numpy's warnings of that are muted.
dp-accounting brings scipy along, a second of processor time: it is imported by the first process that asks.
"""

from __future__ import annotations

import math

import numpy


def gaussian_epsilon(charge: float, delta: float) -> float:
    """Of noise with a deviation of sensitivity/√charge."""
    import dp_accounting

    with numpy.errstate(all="ignore"):
        return float(dp_accounting.get_epsilon_gaussian(charge**-0.5, delta))


def gaussian_noise(epsilon: float, delta: float) -> float:
    """The smallest deviation, in sensitivities, with this epsilon."""
    import dp_accounting

    with numpy.errstate(all="ignore"):
        return float(dp_accounting.get_sigma_gaussian(epsilon, delta))


def concentrated_epsilon(rho: float, delta: float) -> float:
    """Of ρ-zero-concentrated privacy (Bun and Steinke 2016), through Rényi divergences of orders around the best."""
    from dp_accounting.rdp import rdp_privacy_accountant as renyi

    best = math.sqrt(math.log(1 / delta) / rho)
    orders = 1 + best * numpy.geomspace(0.05, 20, 400)
    return float(renyi.compute_epsilon(orders, rho * orders, delta)[0])


def concentrated_loss(epsilon: float, delta: float) -> float:
    """The largest ρ with this epsilon, to eight digits and not above it."""
    low, high = 0.0, epsilon
    while concentrated_epsilon(high, delta) < epsilon:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if concentrated_epsilon(middle, delta) <= epsilon else (low, middle)
    return low
