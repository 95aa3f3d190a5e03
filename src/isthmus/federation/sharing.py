"""The tensors that silos and root share: which of them a round trains, and how its updates change them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from isthmus.federation.contribution import Contribution
from isthmus.federation.strategies.strategy import Strategy
from isthmus.model import adapters
from isthmus.recipe import FederationSection, TrainSection
from isthmus.updates.flat import Layout

Tensors = Mapping[str, torch.Tensor]


class Sharing:
    """Tensors that are the same at all silos; those that train in a round are averaged in it.

    Where one factor of LoRA rests, the mean of the other is exact: mean(Bᵢ·A) = mean(Bᵢ)·A, with A at rest for good
    (FFA-LoRA, Sun et al. 2024), and mean(B·Aᵢ) = B·mean(Aᵢ) in its turn (RoLoRA, Chen et al. 2024). Of both at once
    it is not. Of gradients the mean is exact in any case.

    Args:
        train: where updates are gradients: the optimizer that steps with their mean.
    """

    def __init__(self, section: FederationSection, train: TrainSection | None = None) -> None:
        self._turns = (adapters.trained_factors(section.lora, 2), adapters.trained_factors(section.lora, 1))
        """LoRA's factors that train in even rounds, and in odd ones."""
        self._strategies: dict[str, Strategy] = defaultdict(lambda: Strategy(section, train))
        """One strategy for each set of factors that train together: a change of B is no momentum for A."""
        self.shares: dict[str, float] = {}
        """Each contribution's part of the last round's change, by name, with the sum 1."""

    def held(self, shared: Tensors, silo: str) -> Tensors:
        """The tensors of the blocks that this silo keeps."""
        return shared

    def begun(self, shared: Tensors, silo: str) -> Tensors:
        """The tensors that this silo begins the next round with."""
        return shared

    def layout(self, begun: Tensors, round: int) -> Layout:
        """The layout of an update in this round, by a silo that began with these tensors."""
        return Layout.of(adapters.select_factors(begun, self.factors(round)))

    def next(self, shared: Tensors, round: int, contributions: Sequence[Contribution]) -> dict[str, torch.Tensor]:
        """The shared tensors after this round.

        Args:
            shared: before it.
            contributions: the changes of those who learned something, all of the same tensors.
        """
        strategy = self._strategies[self.factors(round)]
        trained = contributions[0].change if contributions else {}
        after = strategy.next({name: shared[name] for name in trained if name in shared}, contributions, round)
        self.shares = strategy.shares
        return {**shared, **after}

    def state_dict(self) -> dict[str, Any]:
        return {factors: strategy.state_dict() for factors, strategy in self._strategies.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for factors, kept in state.items():
            self._strategies[factors].load_state_dict(kept)

    def factors(self, round: int) -> str:
        """LoRA's factors that train in this round: A, B or both."""
        return self._turns[round % 2]
