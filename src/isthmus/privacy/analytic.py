"""The Gaussian mechanism's exact epsilon and noise (Balle and Wang 2018, theorem 8), by dp-accounting.

Where epsilon is large, its logarithms reach zero on the way to the right answer; numpy's warnings of that are muted.
"""

from __future__ import annotations

import dp_accounting
import numpy


def gaussian_epsilon(charge: float, delta: float) -> float:
    """Of noise with a deviation of sensitivity/√charge."""
    with numpy.errstate(all="ignore"):
        return float(dp_accounting.get_epsilon_gaussian(charge**-0.5, delta))


def gaussian_noise(epsilon: float, delta: float) -> float:
    """The smallest deviation, in sensitivities, with this epsilon."""
    with numpy.errstate(all="ignore"):
        return float(dp_accounting.get_sigma_gaussian(epsilon, delta))
