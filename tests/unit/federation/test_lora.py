"""Products of factors against the whole matrices they stand for, formed in double precision."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.federation import lora
from isthmus.federation.lora import Product

EXACT = 1e-6
Silos = tuple[list[Product], list[float]]


def whole(product: Product) -> torch.Tensor:
    return product.b_OR.double() @ product.a_RI.double()


def mean(products: Sequence[Product], weights: Sequence[float]) -> torch.Tensor:
    """Of the whole products."""
    total = sum(weights)
    return torch.stack([weight / total * whole(one) for one, weight in zip(products, weights, strict=True)]).sum(dim=0)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@st.composite
def federations(draw: st.DrawFn, *, mixed: bool = True) -> Silos:
    """Silos' fp32 factors, of scales far apart, with their weights."""
    outputs, inputs = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    count = draw(st.integers(1, 6))
    rank = draw(st.integers(1, 8))
    ranks = [draw(st.integers(1, 8)) if mixed else rank for _ in range(count)]
    weights = [draw(st.floats(1e-3, 1e6)) for _ in range(count)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scales = [10 ** draw(st.floats(-3, 3)) for _ in range(count)]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return [
        Product(random(outputs, one), scale * random(one, inputs)) for one, scale in zip(ranks, scales, strict=True)
    ], weights


@settings(max_examples=80, deadline=None)
@given(federations())
def test_a_stack_is_the_mean_of_products_of_any_ranks(silos: Silos) -> None:
    product = lora.stacked(*silos)
    assert product.rank == sum(one.rank for one in silos[0])
    assert error(whole(product), mean(*silos)) <= EXACT


@settings(max_examples=80, deadline=None)
@given(federations(mixed=False))
def test_the_averages_and_their_residual_are_the_mean(silos: Silos) -> None:
    products, weights = silos
    average, missed = lora.averaged(products, weights), lora.residual(products, weights)
    assert (average.rank, missed.rank) == (products[0].rank, products[0].rank * len(products))
    expected = mean(products, weights)
    scale = max(float(expected.norm()), float(whole(average).norm()))
    assert (whole(average) + whole(missed) - expected).norm() <= EXACT * scale


def test_averages_alone_are_not_the_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    products = [Product(torch.randn(9, 3, generator=draw), torch.randn(3, 7, generator=draw)) for _ in range(4)]
    weights = [1.0, 2.0, 3.0, 4.0]
    assert error(whole(lora.averaged(products, weights)), mean(products, weights)) > 0.1


@settings(max_examples=20, deadline=None)
@given(federations(mixed=False))
def test_where_one_factor_is_the_same_averages_miss_nothing(silos: Silos) -> None:
    products, weights = silos
    for alike in (
        [Product(one.b_OR, products[0].a_RI) for one in products],
        [Product(products[0].b_OR, one.a_RI) for one in products],
    ):
        scale = max(float(whole(one).norm()) for one in alike)
        assert (whole(lora.averaged(alike, weights)) - mean(alike, weights)).norm() <= EXACT * scale
        assert whole(lora.residual(alike, weights)).norm() <= EXACT * scale


@settings(max_examples=80, deadline=None)
@given(federations(), st.integers(1, 30))
def test_truncation_is_the_nearest_product_of_its_rank(silos: Silos, rank: int) -> None:
    """As near as the whole matrix's own singular values allow (Eckart and Young), and equal where the rank suffices."""
    expected = mean(*silos)
    product = lora.truncated(lora.stacked(*silos), rank)
    outputs, inputs = expected.shape
    assert (product.b_OR.shape, product.a_RI.shape) == ((outputs, rank), (rank, inputs))
    left = torch.linalg.svd(expected).S[rank:].norm()
    assert (whole(product) - expected).norm() <= left + EXACT * expected.norm()
    if rank >= min(outputs, inputs, sum(one.rank for one in silos[0])):
        assert error(whole(product), expected) <= EXACT


def test_truncations_match_a_full_svd() -> None:
    draw = torch.Generator().manual_seed(1)
    products = [Product(torch.randn(40, 4, generator=draw), torch.randn(4, 30, generator=draw)) for _ in range(3)]
    u, s, v = torch.linalg.svd(mean(products, [1.0, 1.0, 1.0]), full_matrices=False)
    for rank in (1, 4, 11, 12):
        actual = whole(lora.truncated(lora.stacked(products, [1.0, 1.0, 1.0]), rank))
        assert error(actual, (u[:, :rank] * s[:rank]) @ v[:rank]) <= EXACT


@pytest.mark.parametrize("empty", ["zero", "narrow"])
def test_what_is_truncated_can_learn(empty: str) -> None:
    """Where the product has nothing left, A is still orthonormal, so that B gets a gradient."""
    product = Product(torch.zeros(9, 5), torch.randn(5, 12))
    if empty == "narrow":
        product = Product(torch.randn(9, 2), torch.randn(2, 12))
    a_RI = lora.truncated(product, 4).a_RI
    torch.testing.assert_close(a_RI @ a_RI.T, torch.eye(4, dtype=torch.float64))
