"""Sharing among silos of different ranks: each begins with the nearest product of its rank; products are averaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.errors import RecipeError
from isthmus.federation.contribution import Contribution
from isthmus.federation.products import Products, sharing_of
from isthmus.federation.sharing import Sharing
from isthmus.recipe import Recipe
from tests.conftest import make_recipe

B, A = "x.lora_B.weight", "x.lora_A.weight"
RANK, LOW = 3, 1


def recipe_of(lora: str = "svd") -> Recipe:
    silos = [{"name": "a", "train": "a"}, {"name": "b", "train": "b", **({"rank": LOW} if lora == "svd" else {})}]
    return make_recipe(Path("none"), silo=silos, lora={"rank": RANK}, federation={"lora": lora})


def factors(rank: int, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {B: torch.randn(6, rank, generator=draw), A: torch.randn(rank, 5, generator=draw)}


def product(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors[B].double() @ tensors[A].double()


def test_only_svd_shares_by_products() -> None:
    assert isinstance(sharing_of(recipe_of()), Products)
    assert type(sharing_of(recipe_of("frozen-a"))) is Sharing


def test_a_silo_of_lower_rank_begins_with_the_nearest_product() -> None:
    shared, sharing = factors(RANK), Products(recipe_of())
    assert sharing.begun(shared, "a") is shared
    low = dict(sharing.begun(shared, "b"))
    left, values, right = torch.linalg.svd(product(shared))
    nearest = left[:, :LOW] * values[:LOW] @ right[:LOW]
    assert low[B].shape == (6, LOW)
    torch.testing.assert_close(product(low), nearest, rtol=1e-5, atol=1e-5)


def test_the_next_product_is_the_nearest_to_the_mean_of_products() -> None:
    shared, sharing = factors(RANK), Products(recipe_of())
    change = {name: 0.1 * tensor for name, tensor in factors(RANK, seed=1).items()}
    after = sharing.next(shared, 1, [Contribution("a", 3.0, change)])
    trained = {name: shared[name] + change[name] for name in shared}
    torch.testing.assert_close(product(after), product(trained), rtol=1e-5, atol=1e-5)
    assert torch.equal(sharing.next(shared, 1, [])[B], shared[B]), "nobody learned anything"


def test_a_rank_above_the_recipes_is_refused() -> None:
    with pytest.raises(RecipeError, match="rank"):
        make_recipe(
            Path("none"),
            silo=[{"name": "a", "train": "a", "rank": RANK + 1}],
            lora={"rank": RANK},
            federation={"lora": "svd"},
        )
