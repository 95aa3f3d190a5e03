"""Projections of an update: linear, the same for all silos, and each number has its turn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard

from isthmus.updates import projections
from isthmus.updates.projections import BLOCK, Projection, random_k, sketch

SIZE, KEPT = 300, 50


def row(seed: int = 0, size: int = SIZE) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(kind: str, round: int = 1, *, unbiased: bool = False, size: int = SIZE, kept: int = KEPT) -> Projection:
    return {"random-k": random_k, "sketch": sketch}[kind](size, kept, 7, round, unbiased=unbiased)


@pytest.mark.parametrize("kind", ["random-k", "sketch"])
@given(size=st.integers(1, 600), kept=st.integers(1, 600), round=st.integers(1, 9), seed=st.integers(0, 99))
def test_what_comes_back_is_an_orthogonal_projection(kind: str, size: int, kept: int, round: int, seed: int) -> None:
    """Never longer than the row; once more, it is the same."""
    projection = made(kind, round, size=size, kept=min(kept, size))
    once = projection.lift(projection.project(row(seed, size)))
    twice = projection.lift(projection.project(once))
    assert once.shape == (size,)
    assert once.norm() <= row(seed, size).norm() * (1 + 1e-9)
    if kind == "random-k":
        torch.testing.assert_close(twice, once)


@pytest.mark.parametrize("kind", ["random-k", "sketch"])
def test_a_sum_comes_back_as_the_sum(kind: str) -> None:
    projection = made(kind)
    together = projection.lift(projection.project(row(1)) + projection.project(row(2)))
    torch.testing.assert_close(together, projection.lift(projection.project(row(1) + row(2))))


def test_each_number_has_its_turn() -> None:
    places = torch.cat([random_k(SIZE, KEPT, 7, round, unbiased=False).places_K for round in range(1, 7)])
    assert sorted(places.tolist()) == list(range(SIZE))


@pytest.mark.parametrize("kind", ["random-k", "sketch"])
def test_without_bias_the_rounds_of_a_turn_mean_the_row(kind: str) -> None:
    size, kept = BLOCK, 64
    lifted = [made(kind, round, unbiased=True, size=size, kept=kept) for round in range(1, 5)]
    mean = torch.stack([one.lift(one.project(row(size=size))) for one in lifted]).mean(0)
    torch.testing.assert_close(mean, row(size=size))


def test_the_mixing_matrix_is_sylvesters() -> None:
    expected = torch.from_numpy(hadamard(BLOCK, dtype=float)) / BLOCK**0.5
    assert torch.equal(projections._hadamard(), expected)


@pytest.mark.parametrize("kind", ["random-k", "sketch"])
def test_a_row_of_another_length_is_refused(kind: str) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        made(kind).project(row(size=KEPT // 2)) if kind == "random-k" else made(kind).project(row(size=2 * BLOCK + 1))


def test_mixing_twice_gives_the_row_again() -> None:
    one = row(size=3 * BLOCK).float()
    torch.testing.assert_close(projections._mixed(projections._mixed(one)), one)
