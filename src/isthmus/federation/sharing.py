"""What silos and root share from round to round: which tensors an update changes, and what becomes of the updates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from isthmus.federation.contribution import Contribution
from isthmus.federation.strategies.strategy import Strategy
from isthmus.model import adapters
from isthmus.recipe import FederationSection
from isthmus.updates.flat import Layout

Tensors = Mapping[str, torch.Tensor]


class Sharing:
    """Tensors that are the same at all silos; those that train in a round are averaged in it.

    Where one factor of LoRA rests, the mean of the other is exact: mean(Bᵢ·A) = mean(Bᵢ)·A, with A at rest for good
    (FFA-LoRA, Sun et al. 2024), and mean(B·Aᵢ) = B·mean(Aᵢ) in its turn (RoLoRA, Chen et al. 2024). Of both at once
    it is not.
    """

    def __init__(self, section: FederationSection) -> None:
        self._section = section
        self._strategies: dict[str, Strategy] = defaultdict(lambda: Strategy(section))
        """By the factors that train: what one round learned of B is no momentum for A."""
        self.shares: dict[str, float] = {}
        """What each contribution counted for in the last round."""

    def begun(self, shared: Tensors, silo: str) -> Tensors:
        """What this silo begins the next round with."""
        return shared

    def layout(self, begun: Tensors, round: int) -> Layout:
        """Of an update in this round by a silo that began with these."""
        trained = adapters.trained(begun, self._factors(round))
        return Layout.of(trained)

    def next(self, shared: Tensors, round: int, contributions: Sequence[Contribution]) -> dict[str, torch.Tensor]:
        """The shared tensors after this round.

        Args:
            shared: before it.
            contributions: of those who learned something.
        """
        factors = self._factors(round)
        strategy = self._strategies[factors]
        after = strategy.next(adapters.trained(shared, factors), contributions)
        self.shares = strategy.shares
        return {**shared, **after}

    def state_dict(self) -> dict[str, Any]:
        return {factors: strategy.state_dict() for factors, strategy in self._strategies.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for factors, kept in state.items():
            self._strategies[factors].load_state_dict(kept)

    def _factors(self, round: int) -> str:
        return adapters.factors(self._section.lora, round)
