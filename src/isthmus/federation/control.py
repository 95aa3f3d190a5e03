"""SCAFFOLD's control variate at the root (Karimireddy et al. 2020, option II): the mean of the silos' own.

A round changes silo i's control by -c - Δᵢ / Kη, with Δᵢ its update and Kη the way that K steps of the rate η go by a
gradient of one. The mean of these is known from the mean of the updates, so it is under masks, too, and no silo sends
more than its update. Of N silos the n that were in the round change c by n/N times that mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from isthmus.federation.collection import Collected
from isthmus.federation.contribution import changes, proportions
from isthmus.federation.strategies.rules import total
from isthmus.recipe import Recipe
from isthmus.updates.flat import Layout
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb


class RootControl:
    """The mean control variate c, by the tensors' uncut names; zero until a round has trained them."""

    def __init__(self, recipe: Recipe) -> None:
        self._silos = len(recipe.silo)
        self._reach = recipe.train.learning_rate * recipe.mean_reach(1)
        """Kη."""
        self._most = math.inf if recipe.federation.secure.masks else 1.0
        self._mean: dict[str, torch.Tensor] = {}
        self._counted: dict[str, int] = {}
        """By silo, the last round whose change is in c."""

    def add_to(self, plan: pb.Plan, layout: Layout) -> None:
        """Add c of these tensors to the plan of a round that trains them."""
        plan.control.extend(codec.encode_named({name: self._of(name, layout) for name in layout.shapes}))
        plan.counted.update(self._counted)

    def follow(self, round: int, collected: Collected, layout: Layout) -> None:
        """Change c by what a round of these tensors has collected."""
        learned = collected.contributions
        if not learned:
            return
        silos = [name for name, weight in collected.weights.items() if weight]
        shares_N = proportions(learned, self._most)  # as in the strategy: no silo claims more than one
        mean = layout.tensors(total(changes(learned, layout), shares_N))
        for name, change in mean.items():
            before = self._of(name, layout).double()
            self._mean[name] = (before + len(silos) / self._silos * (-before - change / self._reach)).float()
        self._counted |= dict.fromkeys(silos, round)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": dict(self._mean), "counted": dict(self._counted)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mean, self._counted = dict(state["mean"]), dict(state["counted"])

    def _of(self, name: str, layout: Layout) -> torch.Tensor:
        return self._mean.get(name, torch.zeros(layout.shapes[name]))


def root_control(recipe: Recipe) -> RootControl | None:
    """The control variate of a recipe with SCAFFOLD; None: the recipe has none."""
    return RootControl(recipe) if recipe.federation.control == "scaffold" else None
