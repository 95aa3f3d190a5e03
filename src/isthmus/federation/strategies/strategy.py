"""From a round's contributions to the next shared tensors: weighed, made one by a rule, stepped by an optimizer.

Shapes: N contributions, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from isthmus.federation.contribution import Contribution, stacked
from isthmus.federation.strategies.optimizers import Plain
from isthmus.federation.strategies.rules import Mean
from isthmus.model.flat import Layout

Tensors = Mapping[str, torch.Tensor]


class Strategy:
    """What one root does with its rounds.

    Where LoRA's A is the same everywhere (FFA-LoRA, Sun et al. 2024), the mean of the changes of B is exact:
    mean(Bᵢ·A) = mean(Bᵢ)·A.
    """

    def __init__(self) -> None:
        self._rule, self._optimizer = Mean(), Plain()

    def next(self, base: Tensors, contributions: Sequence[Contribution]) -> dict[str, torch.Tensor]:
        """The new shared tensors.

        Args:
            base: the shared tensors that the round began with.
            contributions: of those who learned something; of nobody, and nothing changes.
        """
        if not contributions:
            return dict(base)
        layout = Layout({name: tuple(tensor.shape) for name, tensor in base.items()})
        change_P = self._rule.combine(*stacked(contributions, layout))
        steps = layout.tensors(self._optimizer.step(change_P))
        return {name: (tensor.double() + steps[name]).to(tensor.dtype) for name, tensor in base.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state.get("optimizer", {}))
