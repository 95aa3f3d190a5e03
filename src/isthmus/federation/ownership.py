"""Sharing among silos with different cuts: each tensor is averaged among those who keep its block, and the trunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from isthmus.federation.contribution import Contribution
from isthmus.federation.sharing import Sharing
from isthmus.federation.strategies.strategy import Strategy
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe

Tensors = Mapping[str, torch.Tensor]


class OwnedSharing(Sharing):
    """The mean of each tensor among the contributions that have it.

    The trunk contributes its change of a block with the tokens of the silos that pass it there. So with one local step
    of SGD a round the mean is the step of all silos' rows together, whoever keeps the block.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.federation)
        config = Checkpoint(recipe.model.path).config
        by_ends = {
            recipe.ends(silo.name): frozenset(
                adapters.shared_shapes(adapters.empty_ends(config, recipe.of_silo(silo.name)))
            )
            for silo in recipe.silo
        }
        self._shared: Tensors = {}
        self._held: dict[frozenset[str], Tensors] = {}
        """By what a silo owns, the tensors of ``_shared`` that it begins with: silos of one cut with the very same."""
        self._owned = {silo.name: by_ends[recipe.ends(silo.name)] for silo in recipe.silo}

    def held(self, shared: Tensors, silo: str) -> Tensors:
        owned = self._owned[silo]
        if shared is not self._shared:
            self._shared, self._held = shared, {}
        if owned not in self._held:
            self._held[owned] = {name: tensor for name, tensor in shared.items() if name in owned}
        return self._held[owned]

    def begun(self, shared: Tensors, silo: str) -> Tensors:
        return self.held(shared, silo)

    def next(self, shared: Tensors, round: int, contributions: Sequence[Contribution]) -> dict[str, torch.Tensor]:
        after, shares = dict(shared), self.shares
        for owners, names in self._groups(shared).items():
            own = [one for one in contributions if names[0] in one.change]
            strategy = self._strategy(round, owners)
            base = {name: shared[name] for name in names}
            after |= strategy.next(base, [_restricted(one, names) for one in own])
            if len(owners) == len(self._owned):
                shares = strategy.shares
        self.shares = shares
        return after

    def _groups(self, shared: Tensors) -> dict[frozenset[str], list[str]]:
        """The tensors by the silos that keep their blocks."""
        groups: dict[frozenset[str], list[str]] = {}
        for name in sorted(shared):
            owners = frozenset(silo for silo, own in self._owned.items() if name in own)
            groups.setdefault(owners, []).append(name)
        return groups

    def _strategy(self, round: int, owners: frozenset[str]) -> Strategy:
        """One for each group of tensors: what an optimizer remembers is of the same tensors each time."""
        return self._strategies[f"{self.factors(round)} {' '.join(sorted(owners))}"]


def _restricted(contribution: Contribution, names: Sequence[str]) -> Contribution:
    change = {name: contribution.change[name] for name in names}
    return Contribution(contribution.name, contribution.weight, change, contribution.quality)
