"""Closed-form epsilons, computed by dp-accounting: the analytic Gaussian mechanism (Balle and Wang 2018, theorem 8) and
zero-concentrated privacy (Bun and Steinke 2016).

dp-accounting takes the logarithm of values that underflow to zero where epsilon is large. Its results are right;
numpy's warnings are silenced. It imports scipy, which takes a second, and so is imported at the first call.
"""

from __future__ import annotations

import math

import numpy


def gaussian_epsilon(charge: float, delta: float) -> float:
    """The exact epsilon of Gaussian noise with standard deviation sensitivity/√``charge``."""
    import dp_accounting

    with numpy.errstate(all="ignore"):
        return float(dp_accounting.get_epsilon_gaussian(charge**-0.5, delta))


def gaussian_noise(epsilon: float, delta: float) -> float:
    """The smallest standard deviation, as a multiple of the sensitivity, with this epsilon."""
    import dp_accounting

    with numpy.errstate(all="ignore"):
        return float(dp_accounting.get_sigma_gaussian(epsilon, delta))


def concentrated_epsilon(rho: float, delta: float) -> float:
    """An epsilon of ρ-zero-concentrated privacy: the least over Rényi divergences of orders around the best one."""
    from dp_accounting.rdp import rdp_privacy_accountant as renyi

    best = math.sqrt(math.log(1 / delta) / rho)
    orders = 1 + best * numpy.geomspace(0.05, 20, 400)
    return float(renyi.compute_epsilon(orders, rho * orders, delta)[0])


def concentrated_loss(epsilon: float, delta: float) -> float:
    """The largest ρ whose epsilon is at most this one, to eight digits, rounded down."""
    low, high = 0.0, epsilon
    while concentrated_epsilon(high, delta) < epsilon:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if concentrated_epsilon(middle, delta) <= epsilon else (low, middle)
    return low
