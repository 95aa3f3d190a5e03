"""Measures of dependence: what a channel carries at most, and distance correlation between its ends."""

from __future__ import annotations

import math

import pytest
import torch

from isthmus.privacy.dependence import capacity, distance_correlation


def sample(seed: int, width: int = 3, count: int = 200) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_capacity_is_shannons() -> None:
    z_TW = torch.full((5, 4), 3.0)
    assert capacity(z_TW, 1.5).item() == pytest.approx(4 / 2 * math.log(1 + 9 / 1.5**2), rel=1e-6)


def test_more_noise_carries_less_and_silence_nothing() -> None:
    assert capacity(sample(0), 2.0) < capacity(sample(0), 1.0)
    assert capacity(torch.zeros(5, 3), 1.0) == 0


def test_what_is_moved_and_scaled_depends_wholly() -> None:
    assert distance_correlation(sample(0), 3 * sample(0) + 2).item() == pytest.approx(1.0, abs=1e-4)


def test_what_has_nothing_in_common_depends_little() -> None:
    assert distance_correlation(sample(0, count=500), sample(1, count=500)) < 0.25
    assert distance_correlation(sample(0), torch.ones(200, 1)) < 1e-3


def test_both_can_be_learned_against() -> None:
    x_TD = sample(0).requires_grad_()
    (capacity(x_TD, 1.0) + distance_correlation(x_TD, sample(1))).backward()
    assert x_TD.grad is not None
    assert x_TD.grad.isfinite().all()


def test_samples_of_unlike_counts_are_refused() -> None:
    with pytest.raises(RuntimeError):
        distance_correlation(sample(0, count=5), sample(1, count=6))
