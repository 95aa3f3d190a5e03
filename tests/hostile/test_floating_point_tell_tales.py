"""Released numbers of neighbours lie on one grid: their lowest bits do not tell which of the two was released.

After Mironov (2012): a draw added in floating point gives sums that only one of two neighbours can give. What is known
of a number's size is left out: an attacker learns from half of 10,000 releases of each neighbour how frequent which
lowest bits are, and which lowest bit that is set, and guesses whose the other half are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from isthmus.privacy.discrete import discrete_gaussian
from isthmus.privacy.distributed_gaussian import SumNoise
from isthmus.privacy.mechanisms import (
    LARGEST_STEPS,
    WITHIN,
    Gaussian,
    Mechanism,
    Metric,
    SequenceGaussian,
    grid_step,
    mechanism_of,
)
from isthmus.privacy.noise import SecretNoise
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import ReleaseSection
from isthmus.silo.boundary import UPDATE_SUBJECTS
from isthmus.updates.quantize import Ring

WIDTH = 576
MECHANISMS = {
    "token": mechanism_of(ReleaseSection(mechanism="dp_gaussian", clip=1.0, epsilon=8.0, delta=1e-5)),
    "sequence": mechanism_of(
        ReleaseSection(mechanism="dp_gaussian", clip=3.0, epsilon=8.0, delta=1e-5, unit="sequence")
    ),
    "gaussian": Gaussian(1.0, 0.5),
    "metric": mechanism_of(ReleaseSection(mechanism="metric", clip=1.0, epsilon=20.0)),
}
RELEASES, NARROW = 10_000, 8
Release = Callable[[torch.Tensor], torch.Tensor]
"""Releases of this vector, ``[RELEASES, NARROW]`` whole steps or plain numbers."""


def neighbours(clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A row with all its norm on one coordinate, and the opposite of another."""
    first, second = torch.zeros(1, WIDTH), torch.full((1, WIDTH), -clip * 0.3)
    first[0, 3] = clip
    return first, second


def step_of(mechanism: Mechanism, width: int) -> float:
    assert isinstance(mechanism, Gaussian | SequenceGaussian | Metric)
    deviation = mechanism.scale * math.sqrt(width + 1) if isinstance(mechanism, Metric) else mechanism.scale
    return grid_step(mechanism.clip, deviation)


@pytest.mark.parametrize("name", MECHANISMS)
def test_both_neighbours_give_whole_steps_of_the_same_grid(name: str) -> None:
    mechanism = MECHANISMS[name]
    step, noise, subjects = step_of(mechanism, WIDTH), SecretNoise(), Subjects(("a",), (1,))
    for row in neighbours(mechanism.clip):
        steps = torch.cat([mechanism.secure(row, subjects, noise) for _ in range(20)]).double() / step
        assert torch.equal(steps, steps.round())
        assert steps.abs().max() < LARGEST_STEPS
        # every residue is about as frequent for one as for the other: even and odd steps, too
        assert abs(float((steps % 2).mean()) - 0.5) < 5 * 0.5 / steps.numel() ** 0.5


def test_no_sum_is_possible_for_one_neighbour_only() -> None:
    """The attack itself: numbers whose lowest bits only an addition to zero, or to a large number, can give."""
    mechanism, noise, subjects = Gaussian(1.0, 0.5), SecretNoise(), Subjects(("a",), (1,))
    bits = []
    for row in neighbours(1.0):
        values = torch.cat([mechanism.secure(row, subjects, noise) for _ in range(200)])
        small = values[values.abs() < 0.01].double() * 2**24  # float32 is finer than 2⁻²⁴ there
        bits.append(int((small != small.round()).sum()))
    assert bits == [0, 0]
    floats = mechanism.simulate(torch.zeros(200, WIDTH), Subjects(("a",), (200,)), noise)
    small = floats[floats.abs() < 0.01].double() * 2**24
    assert int((small != small.round()).sum()) > 0, "the test sees the tell-tale where there is one"


def test_rows_with_factors_lie_on_one_grid() -> None:
    factors = torch.tensor([0.5, 1.0, 3.7, 1.0])
    step = grid_step(1.0, 0.5, factors.double().tolist())
    for mechanism in (Gaussian(1.0, 0.5), SequenceGaussian(1.0, 0.5)):
        drawn = mechanism.secure(torch.randn(4, 5000), Subjects(("a", "b"), (2, 2), factors), SecretNoise()).double()
        assert torch.equal(drawn / step, (drawn / step).round())
        assert (drawn.std(dim=1) / 0.5).tolist() == pytest.approx(factors.tolist(), rel=0.05)


@pytest.mark.parametrize("clip", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("ratio", [1e-6, 1e-3, 0.5, 50.0])
def test_cutting_to_the_grid_never_passes_the_clip(clip: float, ratio: float) -> None:
    step = grid_step(clip, clip * ratio)
    assert (clip + 12 * clip * ratio) / step <= LARGEST_STEPS
    row = torch.randn(1, WIDTH, dtype=torch.float64)
    cut = (row / row.norm() * clip * WITHIN / step).trunc() * step
    assert float(cut.norm()) <= clip


def test_an_update_leaves_on_a_grid_too() -> None:
    mechanism = mechanism_of(ReleaseSection(clip=1.0, noise=1.0))
    drawn = mechanism.secure(torch.randn(1, 3000), UPDATE_SUBJECTS, SecretNoise()).double() / grid_step(1.0, 1.0)
    assert torch.equal(drawn, drawn.round())


def by_mechanism(name: str) -> Release:
    mechanism, subjects = MECHANISMS[name], Subjects(("a",) * RELEASES, (1,) * RELEASES)
    return lambda row_W: mechanism.secure(row_W.expand(RELEASES, -1), subjects, SecretNoise())


def in_a_sum(row_W: torch.Tensor) -> torch.Tensor:
    """A silo's whole numbers in a masked sum: rounded at random, with its share of the noise."""
    ring, noise = Ring(3, 1.0), SumNoise(3, 0.5)
    share, values = noise.update(ring.levels, NARROW), row_W.numpy()
    whole = [ring.encode_short(values, share.bound) for _ in range(RELEASES)]
    drawn = discrete_gaussian(SecretNoise(), share.deviation, RELEASES * NARROW)
    return torch.from_numpy(np.stack(whole) + drawn.reshape(RELEASES, NARROW))


def naive(row_W: torch.Tensor) -> torch.Tensor:
    return row_W + 0.5 * torch.randn(RELEASES, NARROW)


RELEASED: dict[str, Release] = {name: by_mechanism(name) for name in MECHANISMS} | {"sum": in_a_sum}


def tells(numbers_2RW: torch.Tensor) -> torch.Tensor:
    """What the lowest bits say, ``[2, R, W]``: five bits from the finest step of all on, and the lowest that is set."""
    whole = (numbers_2RW.double() * 2.0**40).round().long()  # float32 is finer for numbers below 1e-5 only
    low = torch.where(whole == 0, 63, (whole & -whole).double().log2().long())
    base = int(low.min())
    return ((whole >> base) & 31) * 64 + (low - base)


def accuracy(release: Release) -> float:
    """Of an attacker that has learned how frequent each tell is of either neighbour, one release at a time."""
    first = torch.zeros(NARROW)
    second = torch.full((NARROW,), -0.9 / math.sqrt(NARROW))
    told = tells(torch.stack([release(first), release(second)]))
    known, asked = told[:, : RELEASES // 2], told[:, RELEASES // 2 :]
    first_K, second_K = (torch.bincount(one.flatten(), minlength=2048) + 1.0 for one in known)
    evidence_2R = (second_K / first_K).log()[asked].sum(dim=2)
    return float(torch.cat([evidence_2R[0] < 0, evidence_2R[1] > 0]).double().mean())


@pytest.mark.parametrize("name", RELEASED)
def test_of_ten_thousand_releases_the_lowest_bits_tell_no_more_than_chance(name: str) -> None:
    chance = 5 * 0.5 / math.sqrt(RELEASES)
    assert abs(accuracy(RELEASED[name]) - 0.5) < chance


def test_the_same_attacker_tells_numbers_noised_in_floating_point() -> None:
    assert accuracy(naive) > 0.8
