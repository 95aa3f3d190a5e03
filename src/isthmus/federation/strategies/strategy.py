"""From a round's contributions to the next shared tensors: weighed, made one by a rule, stepped by an optimizer.

Shapes: N contributions, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from isthmus.federation.contribution import Contribution, changes
from isthmus.federation.strategies.optimizers import optimizer_of
from isthmus.federation.strategies.rules import Mean
from isthmus.federation.strategies.weights import History, shares
from isthmus.model.flat import Layout
from isthmus.recipe import FederationSection

Tensors = Mapping[str, torch.Tensor]


class Strategy:
    """What one root does with its rounds.

    Where LoRA's A is the same everywhere (FFA-LoRA, Sun et al. 2024), the mean of the changes of B is exact:
    mean(Bᵢ·A) = mean(Bᵢ)·A.
    """

    def __init__(self, section: FederationSection) -> None:
        self._section, self._history = section, History()
        self._rule, self._optimizer = Mean(), optimizer_of(section.optimizer)
        self.shares: dict[str, float] = {}
        """What each contribution counted for in the last round, with the sum 1."""

    def next(self, base: Tensors, contributions: Sequence[Contribution]) -> dict[str, torch.Tensor]:
        """The new shared tensors.

        Args:
            base: the shared tensors that the round began with.
            contributions: of those who learned something; of nobody, and nothing changes, the optimizer neither.
        """
        self.shares = {}
        if not contributions:
            return dict(base)
        layout = Layout({name: tuple(tensor.shape) for name, tensor in base.items()})
        changes_NP = changes(contributions, layout)
        shares_N = shares(self._section, contributions, changes_NP, self._history)
        names = [one.name for one in contributions]
        self._history.note(names)
        self.shares = dict(zip(names, shares_N.tolist(), strict=True))
        change_P = self._rule.combine(changes_NP, shares_N)
        steps = layout.tensors(self._optimizer.step(change_P))
        return {name: (tensor.double() + steps[name]).to(tensor.dtype) for name, tensor in base.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict(), "history": self._history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state.get("optimizer", {}))
        self._history.load_state_dict(state.get("history", {}))
