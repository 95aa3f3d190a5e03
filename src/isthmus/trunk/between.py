"""Adapters of the trunk's blocks that some silos keep themselves: what each round changes in them, and the root's mean.

In a round they train here with the gradients of the silos that pass them. At its end the root takes the change into its
mean with those of the silos that keep these blocks, and the trunk goes on from that mean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from isthmus.errors import RoundLostError
from isthmus.trunk.adapter import SharedAdapter
from isthmus.updates.between import BlocksChange

Tensors = Mapping[str, torch.Tensor]


class BetweenBlocks:
    """These adapters within a round, and what the last saved round changed.

    Args:
        adapter: the trunk's.
    """

    def __init__(self, adapter: SharedAdapter) -> None:
        self._adapter = adapter
        self._base: dict[str, torch.Tensor] = {}
        self._weights: defaultdict[str, float] = defaultdict(float)
        self._saved: dict[str, Any] = {"round": 0, "groups": []}
        self.begin()

    def begin(self) -> None:
        """A round begins from the present tensors."""
        self._base, self._weights = self._present(), defaultdict(float)

    def count(self, weights: Mapping[str, float]) -> None:
        """A step was taken with so many tokens of each silo."""
        for silo, weight in weights.items():
            self._weights[silo] += weight

    def save(self, round: int) -> dict[str, Any]:
        """The state to save at the end of this round."""
        present, groups = self._present(), []
        for absent, names in self._groups().items():
            weight = sum(own for silo, own in self._weights.items() if silo not in absent)
            change = {name: (present[name] - self._base[name]).cpu() for name in names}
            groups.append({"weight": float(weight), "change": change})
        self._saved = {"round": round, "groups": groups}
        return self._saved

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that ``save`` returned; the tensors are in place."""
        self._saved = dict(state)
        self.begin()

    def trained(self, round: int) -> list[BlocksChange]:
        """What this round changed.

        Raises:
            RoundLostError: it is not the round that was saved last.
        """
        if self._saved["round"] != round:
            raise RoundLostError(f"the trunk has not saved round {round}", remedy="train the round again")
        return [BlocksChange(one["weight"], one["change"]) for one in self._saved["groups"]]

    def settle(self, shared: Tensors) -> bool:
        """Replace these tensors by the root's. Returns whether that changed any."""
        present = self._present()
        new = {name: shared[name].to(one.device) for name, one in present.items() if name in shared}
        if all(torch.equal(one, present[name]) for name, one in new.items()):
            return False
        self._adapter.replace(new)
        self.begin()
        return True

    @property
    def saved(self) -> dict[str, Any]:
        """The last saved state."""
        return self._saved

    def _present(self) -> dict[str, torch.Tensor]:
        return {name: one.detach().clone() for name, one in self._adapter.between().items()}

    def _groups(self) -> dict[frozenset[str], list[str]]:
        """The tensors by the silos that keep their blocks."""
        groups: dict[frozenset[str], list[str]] = {}
        for name in self._base:
            groups.setdefault(self._adapter.keepers(name), []).append(name)
        return groups
