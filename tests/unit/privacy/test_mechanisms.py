"""Mechanisms: clip, then noise of the stated distribution; and the event that says what it cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.privacy.accountant import Account
from isthmus.privacy.events import Charge
from isthmus.privacy.mechanisms import Gaussian, Mechanism, Metric, SequenceGaussian, mechanism_of
from isthmus.privacy.noise import SeededNoise
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import ReleaseSection


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def apply(
    mechanism: Mechanism,
    h_TD: torch.Tensor,
    generator: torch.Generator,
    factors_T: torch.Tensor | None = None,
    lengths: tuple[int, ...] = (),
) -> torch.Tensor:
    subjects = about(lengths or (len(h_TD),), factors_T)
    return mechanism.secure(h_TD, subjects, SeededNoise(generator))


def about(lengths: tuple[int, ...], factors_T: torch.Tensor | None = None) -> Subjects:
    return Subjects(tuple(f"r{number}" for number in range(len(lengths))), lengths, factors_T)


def random_rows(rows: int = 2000, width: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=generator(seed))


def test_zero_and_zero_is_the_identity() -> None:
    h_TD = random_rows()
    drawn = generator()
    assert torch.equal(apply(Gaussian(0.0, 0.0), h_TD, drawn), h_TD)
    assert torch.equal(drawn.get_state(), generator().get_state())


def test_the_recipes_section_chooses() -> None:
    assert mechanism_of(ReleaseSection(clip=2.0, noise=0.5)) == Gaussian(2.0, 0.5)
    assert mechanism_of(ReleaseSection(mechanism="metric", epsilon=2.0)) == Metric(0.0, 2.0)


@settings(derandomize=True, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_clip_alone_scales_long_rows_and_leaves_short_ones(clip: float, scale: float, seed: int) -> None:
    h_TD = torch.cat([scale * random_rows(4, 8, seed), torch.zeros(1, 8)])
    clipped = apply(Gaussian(clip, 0.0), h_TD, generator())
    norms = h_TD.norm(dim=1)
    expected = torch.stack([row * (clip / norm) if norm > clip else row for row, norm in zip(h_TD, norms, strict=True)])
    assert torch.allclose(clipped, expected, rtol=1e-5, atol=0)
    assert torch.all(clipped.norm(dim=1) <= clip * (1 + 1e-6))


def test_noise_has_its_deviation_on_every_coordinate_and_no_correlation() -> None:
    drawn = apply(Gaussian(0.0, 0.3), torch.full((40_000, 8), 5.0), generator()) - 5.0
    assert torch.allclose(drawn.std(dim=0), torch.tensor(0.3), rtol=0.02)
    assert drawn.mean(dim=0).abs().max() < 4 * 0.3 / 200
    correlation = torch.corrcoef(drawn.T)
    assert (correlation - torch.eye(8)).abs().max() < 4.5 / 200
    lagged = torch.corrcoef(torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]))[0, 1]
    assert abs(lagged) < 4 / drawn.numel() ** 0.5
    kurtosis = ((drawn / drawn.std()) ** 4).mean()
    assert kurtosis == pytest.approx(3.0, abs=0.1)


def test_noise_comes_after_the_clip() -> None:
    h_TD = 100 * random_rows()
    both = apply(Gaussian(1.0, 0.5), h_TD, generator())
    left = both - apply(Gaussian(1.0, 0.0), h_TD, generator())
    assert left.std() == pytest.approx(0.5, rel=0.02)
    assert abs(left.mean()) < 4 * 0.5 / left.numel() ** 0.5
    assert both.norm(dim=1).mean() > 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_output_is_float32_and_detached(dtype: torch.dtype) -> None:
    h_TD = random_rows(3).to(dtype).requires_grad_(True)
    for mechanism in (Gaussian(0.0, 0.0), Gaussian(1.0, 0.0), Gaussian(1.0, 0.1)):
        secured = apply(mechanism, h_TD, generator())
        assert secured.dtype is torch.float32
        assert not secured.requires_grad
    assert h_TD.dtype is dtype


def test_the_input_is_never_changed() -> None:
    h_TD = random_rows()
    before = h_TD.clone()
    apply(Gaussian(0.5, 0.5), h_TD, generator())
    assert torch.equal(h_TD, before)


def noise_of(mechanism: Mechanism, rows: int = 20_000, width: int = 8, **how: Any) -> torch.Tensor:
    return apply(mechanism, torch.zeros(rows, width), generator(), **how)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.floats(0.05, 50), st.floats(1e-9, 0.1), st.sampled_from(["token", "sequence"]), st.floats(0.1, 10))
def test_calibrated_noise_has_the_epsilon_that_was_asked_for(
    epsilon: float, delta: float, unit: str, clip: float
) -> None:
    section = ReleaseSection(mechanism="dp_gaussian", clip=clip, epsilon=epsilon, delta=delta, unit=unit)
    event = mechanism_of(section).event("forward", 1, about((1, 1)), 4)
    assert (event.mechanism, event.unit, event.clip) == ("dp_gaussian", unit, clip)
    for charge in event.charges:
        assert Account().plus(charge).epsilon(delta).value == pytest.approx(epsilon, rel=1e-6)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(1e-2, 1e3), st.integers(0, 99))
def test_a_sequence_is_clipped_as_a_whole(lengths: list[int], scale: float, seed: int) -> None:
    h_TD = scale * random_rows(sum(lengths), 5, seed)
    clipped = apply(SequenceGaussian(1.5, 0.0), h_TD, generator(), lengths=tuple(lengths))
    for piece, plain in zip(clipped.split(lengths), h_TD.split(lengths), strict=True):
        expected = plain * min(1.0, 1.5 / float(plain.norm()))
        assert torch.allclose(piece, expected, rtol=1e-5, atol=0)


def test_a_sequences_clip_weighs_rows_by_their_noise() -> None:
    """Its cost then does not depend on the factors."""
    h_TD, factors_T = 100 * random_rows(6, 5), torch.tensor([0.5, 1.0, 4.0, 2.0, 0.25, 1.0])
    clipped = apply(SequenceGaussian(1.5, 0.0), h_TD, generator(), factors_T, (2, 4))
    for piece in (clipped / factors_T.unsqueeze(1)).split([2, 4]):
        assert float(piece.norm()) == pytest.approx(1.5, rel=1e-5)
    events = [SequenceGaussian(1.5, 0.3).event("forward", 1, about((2, 4), f_T), 5) for f_T in (None, factors_T)]
    assert events[0] == events[1]
    assert [charge.gaussian for charge in events[0].charges] == pytest.approx([100.0, 100.0])


@pytest.mark.parametrize("width", [2, 64])
def test_metric_noise_has_a_gamma_length_and_a_uniform_direction(width: int) -> None:
    drawn = noise_of(Metric(0.0, 4.0), width=width)
    lengths = drawn.norm(dim=1) * 4.0
    assert lengths.mean() == pytest.approx(width, rel=0.02)
    assert lengths.var() == pytest.approx(width, rel=0.05)
    assert drawn.var(dim=0).mean() == pytest.approx((width + 1) / 16, rel=0.03)
    direction = drawn / drawn.norm(dim=1, keepdim=True)
    assert direction.mean(dim=0).abs().max() < 4 / (20_000 * width) ** 0.5
    assert torch.allclose(direction.T @ direction / 20_000, torch.eye(width) / width, atol=0.02)
    assert abs(torch.corrcoef(torch.stack([lengths, direction[:, 0]]))[0, 1]) < 0.03


@pytest.mark.parametrize(
    "mechanism", [Gaussian(0.0, 0.3), SequenceGaussian(9.0, 0.3), Metric(0.0, 10.0)], ids=lambda one: type(one).__name__
)
def test_factors_scale_each_rows_noise(mechanism: Mechanism) -> None:
    factors_T = torch.tensor([0.5, 1.0, 3.0]).repeat_interleave(4000)
    subjects, plain = about((12_000,), factors_T), about((12_000,))
    noises = [mechanism.simulate(torch.zeros(12_000, 8), of, SeededNoise(generator())) for of in (subjects, plain)]
    assert torch.allclose(noises[0], noises[1] * factors_T.unsqueeze(1), rtol=1e-5, atol=1e-7)
    drawn = noise_of(mechanism, 12_000, factors_T=factors_T, lengths=(12_000,))
    spread = [float(piece.std()) / float(noises[1].std()) for piece in drawn.split(4000)]
    assert spread == pytest.approx([0.5, 1.0, 3.0], rel=0.03)


def test_a_rows_charge_follows_its_factor() -> None:
    subjects = Subjects(("a", "b", "a"), (2, 1, 1), torch.tensor([1.0, 2.0, 0.5, 1.0]))
    gaussian = Gaussian(0.5, 0.25).event("gradient", 3, subjects, 7)
    assert gaussian.charges == (Charge("a", 16 * (1 + 1 / 4 + 1)), Charge("b", 16 * 4.0))
    metric = Metric(0.5, 3.0).event("gradient", 3, subjects, 7)
    assert metric.charges == (Charge("a", 0.0, 3 * (1 + 0.5 + 1)), Charge("b", 0.0, 3 * 2.0))
    assert (gaussian.rows, gaussian.width, gaussian.step, gaussian.path, gaussian.size) == (4, 7, 3, "gradient", 0)


@pytest.mark.parametrize("mechanism", [Gaussian(0.0, 1.0), Gaussian(1.0, 0.0), Metric(0.0, 1.0)])
def test_without_clip_or_noise_there_is_no_bound(mechanism: Mechanism) -> None:
    (charge,) = mechanism.event("forward", 1, about((3,)), 2).charges
    assert not charge.bounded
    assert math.isinf(Account().plus(charge).epsilon(1e-5).value)


def test_no_mechanism_assumes_a_width() -> None:
    for mechanism in (Gaussian(1.0, 0.1), SequenceGaussian(1.0, 0.1), Metric(1.0, 1.0)):
        for width in (1, 3, 50):
            assert apply(mechanism, torch.ones(4, width), generator(), lengths=(1, 3)).shape == (4, width)
