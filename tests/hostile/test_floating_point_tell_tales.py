"""Released numbers of neighbours lie on one grid: their lowest bits do not tell which of the two was released.

After Mironov (2012): a draw added in floating point gives sums that only one of two neighbours can give.
"""

from __future__ import annotations

import pytest
import torch

from isthmus.privacy.mechanisms import LARGEST_STEPS, WITHIN, Gaussian, SequenceGaussian, grid_step, mechanism_of
from isthmus.privacy.noise import SecretNoise
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import ReleaseSection
from isthmus.silo.boundary import UPDATE_SUBJECTS

WIDTH = 576
MECHANISMS = {
    "token": mechanism_of(ReleaseSection(mechanism="dp_gaussian", clip=1.0, epsilon=8.0, delta=1e-5)),
    "sequence": mechanism_of(
        ReleaseSection(mechanism="dp_gaussian", clip=3.0, epsilon=8.0, delta=1e-5, unit="sequence")
    ),
    "gaussian": Gaussian(1.0, 0.5),
}


def neighbours(clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A row with all its norm on one coordinate, and the opposite of another."""
    first, second = torch.zeros(1, WIDTH), torch.full((1, WIDTH), -clip * 0.3)
    first[0, 3] = clip
    return first, second


@pytest.mark.parametrize("name", MECHANISMS)
def test_both_neighbours_give_whole_steps_of_the_same_grid(name: str) -> None:
    mechanism = MECHANISMS[name]
    assert isinstance(mechanism, Gaussian | SequenceGaussian)
    step, noise, subjects = grid_step(mechanism.clip, mechanism.noise), SecretNoise(), Subjects(("a",), (1,))
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
