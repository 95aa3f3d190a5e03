"""Aggregating LoRA adapters so that the result is what averaging the weight changes B·A would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

Tensors = Mapping[str, torch.Tensor]


class Aggregation(Protocol):
    """Turns the silos' updates of one round into the next shared adapter."""

    def combine(self, base: Tensors, updates: Sequence[tuple[float, Tensors]]) -> dict[str, torch.Tensor]:
        """The new shared tensors.

        Args:
            base: the shared tensors that the round began with.
            updates: a weight and a change (new minus base) for each silo; with weight 0 there is no change.
        """
        ...


class FrozenA:
    """Weighted mean of the changes of B. Exact, since A is the same everywhere: mean(Bᵢ·A) = mean(Bᵢ)·A (FFA-LoRA,
    Sun et al. 2024)."""

    def combine(self, base: Tensors, updates: Sequence[tuple[float, Tensors]]) -> dict[str, torch.Tensor]:
        updates = [(weight, update) for weight, update in updates if weight]
        total = sum(weight for weight, _ in updates)
        combined = {}
        for name, tensor in base.items():
            change = sum(
                (weight / total * update[name].double() for weight, update in updates), torch.zeros(()).double()
            )
            combined[name] = (tensor.double() + change).to(tensor.dtype)
        return combined


AGGREGATIONS: dict[str, Aggregation] = {"frozen-a": FrozenA()}
