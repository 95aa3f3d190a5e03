"""The secret source of noise: its distributions, its independence, and that torch's generator has no part in it."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from isthmus.privacy.noise import Noise, SecretNoise, SeededNoise, secret_generator

ROWS, WIDTH = 40_000, 12


def sources() -> list[Noise]:
    return [SecretNoise(), SeededNoise(torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("noise", sources(), ids=lambda one: type(one).__name__)
def test_normal_draws_are_standard_and_independent(noise: Noise) -> None:
    drawn = noise.normal(ROWS, WIDTH)
    assert (drawn.shape, drawn.dtype) == ((ROWS, WIDTH), torch.float32)
    count = drawn.numel()
    assert abs(drawn.mean()) < 5 / count**0.5
    for power, moment in ((2, 1), (4, 3), (6, 15)):
        assert float((drawn.double() ** power).mean()) == pytest.approx(moment, rel=0.06)
    beyond = (drawn.abs() > 3).double().mean()
    assert float(beyond) == pytest.approx(math.erfc(3 / 2**0.5), rel=0.15)
    assert (torch.corrcoef(drawn.T) - torch.eye(WIDTH)).abs().max() < 6 / ROWS**0.5
    flat = drawn.flatten()
    half = count // 2  # the two of a pair lie that far apart
    for lag in (1, WIDTH, half):
        assert abs(torch.corrcoef(torch.stack([flat[:-lag], flat[lag:]]))[0, 1]) < 6 / half**0.5
        assert abs(torch.corrcoef(torch.stack([flat[:-lag].square(), flat[lag:].square()]))[0, 1]) < 8 / half**0.5


@pytest.mark.parametrize("noise", sources(), ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("shape", [1, 2, 31])
def test_gamma_draws(noise: Noise, shape: int) -> None:
    drawn = noise.gamma(ROWS, shape)
    assert (drawn.shape, drawn.dtype) == ((ROWS,), torch.float32)
    assert float(drawn.mean()) == pytest.approx(shape, rel=0.03)
    assert float(drawn.var()) == pytest.approx(shape, rel=0.06)
    assert float(((drawn - shape) ** 3).mean()) == pytest.approx(2 * shape, rel=0.3)
    assert drawn.min() > 0


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 1), (1, 7), (5, 5)])
def test_odd_numbers_of_draws(rows: int, width: int) -> None:
    noise = SecretNoise()
    assert noise.normal(rows, width).shape == (rows, width)
    assert noise.gamma(rows, width).shape == (rows,)
    assert noise.normal(rows, width).isfinite().all()


def test_secret_noise_neither_repeats_nor_hangs_on_torchs_seed() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = SecretNoise()
    first, second = one.normal(50, 4), one.normal(50, 4)
    torch.manual_seed(0)
    other = SecretNoise().normal(50, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.all(first != second)
    assert torch.all(first != other)


def test_secret_noise_is_the_keystream_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key and start come from the system's entropy, 256 and 128 bits, and nothing else does."""
    asked: list[int] = []

    def known(count: int) -> bytes:
        asked.append(count)
        return bytes(range(count))

    monkeypatch.setattr("isthmus.privacy.noise.secrets.token_bytes", known)
    assert torch.equal(SecretNoise().normal(9, 5), SecretNoise().normal(9, 5))
    assert asked == [32, 16] * 2


def test_threads_draw_at_once_and_never_the_same() -> None:
    noise = SecretNoise()
    with ThreadPoolExecutor(8) as threads:
        drawn = list(threads.map(lambda _: noise.words(5000), range(200)))
    assert len(set(np.concatenate(drawn).tolist())) == 200 * 5000


def test_generators_for_rounding_are_each_their_own() -> None:
    torch.manual_seed(0)
    first = secret_generator()
    torch.manual_seed(0)
    assert first.initial_seed() != secret_generator().initial_seed() != torch.initial_seed()
