"""Distance of each way to aggregate adapters from the mean of the silos' products B·A. A part of ``make
bench-federation``.

The factors are drawn, of the shape of an adapter on a projection of SmolLM2-135M, some rounds into a run: a common
adapter, and each silo's change of it, a quarter as large. What is published is fp32; the oracle forms whole matrices
in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from benchmarks.common.results import Results
from isthmus.federation import lora
from isthmus.federation.contribution import Contribution
from isthmus.federation.lora import Product
from isthmus.federation.sharing import Sharing
from isthmus.recipe import FederationSection

WIDTH, SILOS, RANK = 576, 10, 8
MIXED = (4, 8, 16)
WEIGHTS = [100.0 + 10 * number for number in range(SILOS)]
A, B = "q_proj.lora_A.weight", "q_proj.lora_B.weight"
EXACT = 1.0
"""In millionths, of what claims to be exact."""


def measure(results: Results) -> None:
    averages(results)
    products(results, f"rank {RANK}", [silo(number, RANK) for number in range(SILOS)])
    products(results, "ranks 4, 8, 16", [silo(number, MIXED[number % len(MIXED)]) for number in range(SILOS)])


def averages(results: Results) -> None:
    """The root's averages, round by round, by its own code."""
    for mode, round in (("frozen-a", 1), ("alternating", 1), ("alternating", 2), ("plain", 1)):
        sharing, before = Sharing(FederationSection.model_validate({"lora": mode})), tensors(base(RANK))
        shared = {name: before[name] for name in (A, B) if (mode, name) != ("frozen-a", A)}
        trained = sharing.layout(shared, round).shapes
        silos = [{**before, **{name: tensors(silo(one, RANK))[name] for name in trained}} for one in range(SILOS)]
        contributions = [
            Contribution(str(number), WEIGHTS[number], {name: own[name] - before[name] for name in trained})
            for number, own in enumerate(silos)
        ]
        after = {**before, **sharing.next(shared, round, contributions)}
        error = distance([product(after)], mean([product(own) for own in silos]))
        what = " and ".join(name.split(".")[1] for name in trained)
        add(results, f"rank {RANK}: {mode}, a round of {what}", error, exact=mode != "plain")


def products(results: Results, ranks: str, silos: list[Product]) -> None:
    """Ways that use all factors of all silos."""
    expected, stack = mean(silos), lora.stacked(silos, WEIGHTS)
    values = torch.linalg.svdvals(expected)
    padded = [one.padded(max(MIXED)) for one in silos]
    apart = [lora.averaged(padded, WEIGHTS)]
    add(results, f"{ranks}: A and B averaged apart", distance(apart, expected))
    add(
        results, f"{ranks}: with the residual", distance([*apart, lora.residual(padded, WEIGHTS)], expected), exact=True
    )
    add(results, f"{ranks}: stacked, to rank {stack.rank}", distance([stack], expected), exact=True)
    add(
        results, f"{ranks}: SVD, rank {stack.rank}", distance([lora.truncated(stack, stack.rank)], expected), exact=True
    )
    for rank in MIXED:
        add(results, f"{ranks}: SVD, rank {rank}", distance([lora.truncated(stack, rank)], expected))
        add(results, f"{ranks}: the best there is, rank {rank}", float(values[rank:].norm() / values.norm()))


def add(results: Results, measure: str, error: float, *, exact: bool = False) -> None:
    millionths = 1e6 * error
    results.add(f"aggregation error, {measure}", millionths, "millionths", at_most=EXACT if exact else None)


def base(rank: int) -> Product:
    """The first so many factors of what all silos had."""
    b_OR, a_RI = drawn(0, WIDTH, max(MIXED)), drawn(1, max(MIXED), WIDTH)
    return Product(b_OR[:, :rank], a_RI[:rank])


def silo(number: int, rank: int) -> Product:
    """One silo's factors at the round's end."""
    had = base(rank)
    b_OR, a_RI = drawn(2 + 2 * number, WIDTH, rank), drawn(3 + 2 * number, rank, WIDTH)
    return Product(had.b_OR + b_OR / 4, had.a_RI + a_RI / 4)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(WIDTH)


def tensors(product: Product) -> dict[str, torch.Tensor]:
    return {A: product.a_RI, B: product.b_OR}


def product(tensors: dict[str, torch.Tensor]) -> Product:
    return Product(tensors[B], tensors[A])


def mean(silos: Sequence[Product]) -> torch.Tensor:
    """Of the whole products."""
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    return sum((share * whole(one) for share, one in zip(shares, silos, strict=True)), torch.zeros(1))


def distance(published: Sequence[Product], expected: torch.Tensor) -> float:
    """Of what these make together, in fp32, relative to what is expected."""
    made = sum((whole(Product(one.b_OR.float(), one.a_RI.float())) for one in published), torch.zeros(1))
    return float((made - expected).norm() / expected.norm())


def whole(product: Product) -> torch.Tensor:
    return product.b_OR.double() @ product.a_RI.double()
