"""Exact sampling of the discrete Gaussian: integers z with probability proportional to exp(-z² / (2·variance)).

After Canonne, Kamath and Steinke (2020), algorithms 1 to 3: a discrete Laplace draw is proposed and accepted with a
probability that makes it Gaussian. The algorithms flip coins with probability exp(-x) for rational x. Here 64 random
bits are compared with exp(-x) in floating point. Where the two are too close for floating point to decide, more bits
are drawn and exp(-x) is computed to as many digits as needed. So no probability is rounded, and nearly every coin costs
one 64-bit word.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from isthmus.privacy.noise import Noise

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
NEAR = 2.0**-44
"""Distance below which a coin's comparison is repeated exactly; far above the rounding error of exp(-x) in float64."""
LARGEST_DEVIATION = 2.0**40
"""Largest deviation for which squares of draws are accurate enough in float64."""


def discrete_gaussian(noise: Noise, deviation: float, count: int) -> Integers:
    """Independent draws, int64 ``[count]``. Their variance is at most ``deviation``², and close to it from 1 on.

    Args:
        noise: source of the random bits.
        deviation: the parameter σ, taken as the exact value of the float; above 0, at most ``LARGEST_DEVIATION``.
    """
    assert 0 < deviation <= LARGEST_DEVIATION
    variance, scale = Fraction(deviation) ** 2, math.floor(deviation) + 1
    drawn: list[Integers] = []
    while (missing := count - sum(map(len, drawn))) > 0:
        proposed = _laplace(noise, scale, 3 * missing + 64)
        drawn.append(proposed[_fitting(noise, abs(proposed), variance, scale)])
    return np.concatenate([*drawn, np.zeros(0, np.int64)])[:count]


def _fitting(noise: Noise, sizes: Integers, variance: Fraction, scale: int) -> Flags:
    """Whether each discrete Laplace draw of this absolute value is accepted: with probability exp(-(size - σ²/t)² /
    (2σ²)), where t is the scale."""
    centre, spread = float(variance / scale), float(2 * variance)
    return _coins(
        noise,
        np.square(sizes.astype(np.float64) - centre) / spread,
        lambda place: (int(sizes[place]) - variance / scale) ** 2 / (2 * variance),
    )


def _laplace(noise: Noise, scale: int, tries: int) -> Integers:
    """Discrete Laplace draws, with probability proportional to exp(-abs(z) / scale); fewer than ``tries``."""
    rest = _below(noise, scale, tries)
    rest = rest[_coins(noise, rest / scale, lambda place: Fraction(int(rest[place]), scale))]
    sizes = rest + scale * _geometric(noise, len(rest))
    negative = (noise.words(len(sizes)) & np.uint64(1)).astype(np.bool_)
    signed = np.where(negative, -sizes, sizes)
    unique: Integers = signed[~(negative & (sizes == 0))]  # otherwise 0 would count twice
    return unique


def _geometric(noise: Noise, count: int) -> Integers:
    """Numbers of successive heads of a coin with probability 1/e, ``[count]``."""
    heads = np.zeros(count, np.int64)
    going = np.arange(count)
    while len(going):
        going = going[_coins(noise, np.ones(len(going)), lambda place: Fraction(1))]
        heads[going] += 1
    return heads


def _below(noise: Noise, bound: int, tries: int) -> Integers:
    """Uniform integers from 0 to ``bound`` - 1; rejection may give fewer than ``tries``."""
    words = noise.words(tries)
    return (words[words <= np.uint64(2**64 - 1 - 2**64 % bound)] % np.uint64(bound)).astype(np.int64)


def _coins(noise: Noise, x: Floats, exact: Callable[[int], Fraction]) -> Flags:
    """Coins that are heads with probability exp(-x), one for each x.

    Args:
        exact: gives the exact value of x at an index.
    """
    words, chance = noise.words(len(x)), np.exp(-x)
    uniform = words.astype(np.float64) * 2.0**-64
    heads: Flags = uniform < chance
    for place in np.flatnonzero(abs(uniform - chance) < NEAR):
        heads[place] = _exact_coin(noise, int(words[place]), exact(int(place)))
    return heads


def _exact_coin(noise: Noise, word: int, x: Fraction) -> bool:
    """Whether a uniform number between 0 and 1 whose first 64 bits are ``word`` lies below exp(-x); draws more bits."""
    bits = 64
    while True:
        word, bits = word << 64 | int(noise.words(1)[0]), bits + 64
        with localcontext() as context:
            context.prec = bits  # decimal digits, far more than this many bits need
            chance = int((-Decimal(x.numerator) / Decimal(x.denominator)).exp() * 2**bits)
        if word < chance - 1:
            return True
        if word > chance + 1:
            return False
