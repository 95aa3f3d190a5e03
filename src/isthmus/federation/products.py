"""Sharing among silos of different ranks: the root multiplies what each has, and gives each what fits its rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from isthmus.federation.contribution import Contribution
from isthmus.federation.lora import Product, stacked, truncated
from isthmus.federation.ownership import OwnedSharing
from isthmus.federation.sharing import Sharing
from isthmus.recipe import Recipe

Tensors = Mapping[str, torch.Tensor]


class Products(Sharing):
    """The product of rank ``lora.rank`` that is nearest to the mean of the silos' B·A (FlexLoRA, Bai et al. 2024).

    A silo of a lower rank begins each round with the nearest product of that rank. What is no factor is averaged.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.federation)
        self._rank = recipe.lora.rank
        self._ranks = {silo.name: silo.rank for silo in recipe.silo if silo.rank is not None}
        self._begun: dict[int, Tensors] = {}
        """By rank, what the next round begins with: a silo's change is one of these very factors."""

    def begun(self, shared: Tensors, silo: str) -> Tensors:
        rank = self._ranks.get(silo, self._rank)
        if rank == self._rank:
            return shared
        if rank not in self._begun:
            less = [_named(name, truncated(_product(shared, name), rank)) for name in _layers(shared)]
            self._begun[rank] = {**shared, **{name: one for layer in less for name, one in layer.items()}}
        return self._begun[rank]

    def next(self, shared: Tensors, round: int, contributions: Sequence[Contribution]) -> dict[str, torch.Tensor]:
        if not contributions:
            return dict(shared)
        silos, weights = [self._trained(shared, one) for one in contributions], [one.weight for one in contributions]
        after = {name: tensor for name, tensor in shared.items() if "lora_" not in name}
        if after:
            after = super().next(after, round, contributions)
        for name in _layers(shared):
            mean = stacked([_product(own, name) for own in silos], weights)
            after.update(_named(name, truncated(mean, self._rank)))
        self._begun = {}
        return after

    def _trained(self, shared: Tensors, contribution: Contribution) -> Tensors:
        """The silo's tensors at the round's end, fp64."""
        begun = self.begun(shared, contribution.name)
        return {name: begun[name].double() + change for name, change in contribution.change.items()}


def sharing_of(recipe: Recipe) -> Sharing:
    """The sharing of a recipe: among equal ranks or among several, among equal cuts or among several."""
    if recipe.trains_between:
        return OwnedSharing(recipe)
    if recipe.federation.lora == "svd":
        return Products(recipe)
    return Sharing(recipe.federation, recipe.train if recipe.sends_gradients else None)


def _layers(tensors: Tensors) -> list[str]:
    """The names of B of all adapted layers."""
    return [name for name in tensors if "lora_B" in name]


def _product(tensors: Tensors, name: str) -> Product:
    return Product(tensors[name], tensors[name.replace("lora_B", "lora_A")])


def _named(name: str, product: Product) -> dict[str, torch.Tensor]:
    return {name: product.b_OR.float(), name.replace("lora_B", "lora_A"): product.a_RI.float()}
