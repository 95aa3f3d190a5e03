"""Draws of the discrete Gaussian against its own probabilities, by whichever way their coins are settled."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from isthmus.privacy import discrete
from isthmus.privacy.discrete import discrete_gaussian
from isthmus.privacy.noise import Noise, SecretNoise, SeededNoise

UNLIKELY = 1e-6
"""Of a test that a right sampler fails."""
SOURCES = [SecretNoise(), SeededNoise(torch.Generator().manual_seed(3))]


class Words(SecretNoise):
    """A source that gives the same word over and over."""

    def __init__(self, word: int) -> None:
        super().__init__()
        self._word = word

    def words(self, count: int) -> np.ndarray:
        return np.full(count, self._word, np.uint64)


def probabilities(deviation: float, widest: int) -> np.ndarray:
    """Of the whole numbers from -widest to widest, straight from the definition."""
    sizes = np.arange(-widest, widest + 1)
    weights = np.exp(-(sizes.astype(float) ** 2) / (2 * deviation**2))
    return weights / weights.sum()


def assert_drawn_from(drawn: np.ndarray, pmf: np.ndarray) -> None:
    """A chi-square test of the sizes that are often drawn; of all rarer ones together, that there are not too many."""
    widest = len(pmf) // 2
    expected = pmf * len(drawn)
    found = np.bincount(np.clip(drawn, -widest, widest) + widest, minlength=len(pmf)).astype(float)
    often = expected >= 10
    assert stats.poisson.sf(found[~often].sum() - 1, expected[~often].sum()) > UNLIKELY
    if often.sum() > 1:
        share = found[often].sum() / expected[often].sum()
        assert stats.chisquare(found[often], expected[often] * share).pvalue > UNLIKELY


@pytest.mark.parametrize("noise", SOURCES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("deviation", [0.2, 0.5, 0.8, 1.0, 2.7, 31.5])
def test_draws_have_the_probabilities_of_the_definition(noise: Noise, deviation: float) -> None:
    drawn = discrete_gaussian(noise, deviation, 200_000)
    assert (drawn.shape, drawn.dtype) == ((200_000,), np.int64)
    assert_drawn_from(drawn, probabilities(deviation, math.ceil(20 * deviation) + 2))


@pytest.mark.parametrize("deviation", [0.7, 3.0])
def test_coins_settled_in_many_digits_have_them_too(monkeypatch: pytest.MonkeyPatch, deviation: float) -> None:
    """Every coin is held too near to call, so that all are decided by further bits and exact fractions."""
    monkeypatch.setattr(discrete, "NEAR", 2.0)
    drawn = discrete_gaussian(SecretNoise(), deviation, 3_000)
    assert_drawn_from(drawn, probabilities(deviation, math.ceil(20 * deviation) + 2))


def test_a_coin_is_settled_as_its_exact_probability_says() -> None:
    """The 64 bits that a coin begins with lie below exp(-x), above it, or are exp(-x)'s own: then the next ones say."""
    x = Fraction(1, 3)
    word = math.floor(math.exp(-1 / 3) * 2**53) << 11
    assert discrete._exact_coin(SecretNoise(), word - 2**12, x)
    assert not discrete._exact_coin(SecretNoise(), word + 2**12, x)

    exact = 13217669706954385033  # floor(2**64 · exp(-1/3))
    for further, below in ((0, True), (2**64 - 1, False)):
        assert discrete._exact_coin(Words(further), exact, x) is below


@pytest.mark.parametrize("deviation", [1.0, 4.0, 50.0])
def test_the_sum_of_draws_is_nearly_a_draw(deviation: float) -> None:
    """Additivity: five silos' draws against one discrete Gaussian of five times the variance."""
    noise, silos = SecretNoise(), 5
    total = sum(discrete_gaussian(noise, deviation, 100_000) for _ in range(silos))
    whole = deviation * math.sqrt(silos)
    assert_drawn_from(total, probabilities(whole, math.ceil(20 * whole)))


def test_draws_are_independent_and_even_at_a_large_deviation() -> None:
    drawn = discrete_gaussian(SecretNoise(), 1e9, 200_000).astype(float) / 1e9
    assert stats.kstest(drawn, "norm").pvalue > UNLIKELY
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 6 / len(drawn) ** 0.5
    assert abs(np.corrcoef(drawn[:-1] ** 2, drawn[1:] ** 2)[0, 1]) < 6 / len(drawn) ** 0.5


@pytest.mark.parametrize("count", [0, 1, 7])
def test_few_draws(count: int) -> None:
    assert len(discrete_gaussian(SecretNoise(), 3.0, count)) == count


def test_an_update_is_drawn_in_a_moment() -> None:
    noise = SecretNoise()
    started = time.process_time()
    discrete_gaussian(noise, 1000.0, 460_800)
    assert time.process_time() - started < 2.0  # 0.1 s on one idle core


@pytest.mark.parametrize("noise", SOURCES, ids=lambda one: type(one).__name__)
def test_words_are_even_in_every_bit(noise: Noise) -> None:
    words = noise.words(40_000)
    bits = (words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert (abs(bits.mean(axis=0) - 0.5) < 6 * 0.5 / 200).all()
    assert len(np.unique(words)) == len(words)
