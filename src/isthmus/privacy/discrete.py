"""Draws of the discrete Gaussian, exact: whole numbers z with probability proportional to exp(-z² / (2·variance)).

After Canonne, Kamath and Steinke (2020), algorithms 1 to 3: a discrete Laplace draw is proposed, then kept with a
probability that makes it Gaussian. Their coins come up with probability exp(-x) for fractions x. Here 64 bits of a coin
are compared with exp(-x) in floating point; where these lie too near each other to trust that, further bits are drawn
and exp(-x) is computed in as many digits as it takes. So no probability is rounded, and nearly all coins cost one word.
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
"""Far above what floating point gets wrong of a coin's probability."""
LARGEST = 2.0**40
"""Of the deviation: then squares of what is drawn are still doubles with few wrong digits."""


def discrete_gaussian(noise: Noise, deviation: float, count: int) -> Integers:
    """So many independent draws. Their variance is at most ``deviation``², and nearly so from a deviation of 1 on.

    Args:
        noise: where the bits come from.
        deviation: the parameter σ, taken as the fraction that the double is; above 0, at most ``LARGEST``.
    """
    assert 0 < deviation <= LARGEST
    variance, scale = Fraction(deviation) ** 2, math.floor(deviation) + 1
    drawn: list[Integers] = []
    while (missing := count - sum(map(len, drawn))) > 0:
        proposed = _laplace(noise, scale, 3 * missing + 64)
        drawn.append(proposed[_fitting(noise, abs(proposed), variance, scale)])
    return np.concatenate([*drawn, np.zeros(0, np.int64)])[:count]


def _fitting(noise: Noise, sizes: Integers, variance: Fraction, scale: int) -> Flags:
    """Which of these sizes of discrete Laplace draws are kept: with probability exp(-(size - σ²/t)² / (2σ²))."""
    centre, spread = float(variance / scale), float(2 * variance)
    return _coins(
        noise,
        np.square(sizes.astype(np.float64) - centre) / spread,
        lambda place: (int(sizes[place]) - variance / scale) ** 2 / (2 * variance),
    )


def _laplace(noise: Noise, scale: int, tries: int) -> Integers:
    """Draws with probability proportional to exp(-abs(z) / scale); fewer than there were tries."""
    rest = _below(noise, scale, tries)
    rest = rest[_coins(noise, rest / scale, lambda place: Fraction(int(rest[place]), scale))]
    sizes = rest + scale * _geometric(noise, len(rest))
    negative = (noise.words(len(sizes)) & np.uint64(1)).astype(np.bool_)
    signed = np.where(negative, -sizes, sizes)
    once: Integers = signed[~(negative & (sizes == 0))]  # zero has one sign
    return once


def _geometric(noise: Noise, count: int) -> Integers:
    """How often a coin of probability 1/e comes up before it does not."""
    heads = np.zeros(count, np.int64)
    going = np.arange(count)
    while len(going):
        going = going[_coins(noise, np.ones(len(going)), lambda place: Fraction(1))]
        heads[going] += 1
    return heads


def _below(noise: Noise, bound: int, tries: int) -> Integers:
    """Whole numbers from 0 to under the bound, each as likely as any other; now and then fewer than tries."""
    words = noise.words(tries)
    return (words[words <= np.uint64(2**64 - 1 - 2**64 % bound)] % np.uint64(bound)).astype(np.int64)


def _coins(noise: Noise, x: Floats, exact: Callable[[int], Fraction]) -> Flags:
    """Coins that come up with probability exp(-x).

    Args:
        exact: x at a place, as the fraction that the float stands for.
    """
    words, chance = noise.words(len(x)), np.exp(-x)
    uniform = words.astype(np.float64) * 2.0**-64
    heads: Flags = uniform < chance
    for place in np.flatnonzero(abs(uniform - chance) < NEAR):
        heads[place] = _settled(noise, int(words[place]), exact(int(place)))
    return heads


def _settled(noise: Noise, word: int, x: Fraction) -> bool:
    """Whether a number between 0 and 1 that begins with these 64 bits lies below exp(-x); further bits are drawn."""
    bits = 64
    while True:
        word, bits = word << 64 | int(noise.words(1)[0]), bits + 64
        with localcontext() as context:
            context.prec = bits  # decimal digits: far more than so many bits have
            chance = int((-Decimal(x.numerator) / Decimal(x.denominator)).exp() * 2**bits)
        if word < chance - 1:
            return True
        if word > chance + 1:
            return False
