"""The clip that a round's updates are held to, where their sum is noised: it stays, or it follows a quantile of norms.

Adaptive clipping after Andrew et al. (2021): each silo says whether its update was within the clip C, the sum of these
bits is noised like the update, and with b the part that said yes C becomes C·exp(-rate·(b - quantile)). So C finds the
norm that this part of the updates does not exceed, and nobody tells its norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from isthmus.federation.collection import Collected
from isthmus.model import adapters
from isthmus.recipe import FederationSection
from isthmus.recipe.sections.federation.clip import LONGEST, SHORTEST


class Clip:
    """Rounds that train other factors of LoRA have clips of their own: B's changes are not as long as A's."""

    def __init__(self, section: FederationSection) -> None:
        self._lora, self._section = section.lora, section.clip
        self._norms: dict[str, float] = {}

    def norm(self, round: int) -> float:
        """Of this round's updates; 0 where none is asked for."""
        start = self._section.norm if self._section is not None else 0.0
        return self._norms.get(self._factors(round), start)

    def follow(self, round: int, collected: Collected) -> None:
        """Take the round's word on how many updates were within the clip; of nobody there is none."""
        if self._section is None or collected.sums is None or collected.total_KS is None:
            return
        within = collected.sums.within(collected.total_KS)
        if within is not None and self._section.quantile is not None:
            step = self._section.rate * (min(1.0, max(0.0, within)) - self._section.quantile)
            moved = self.norm(round) * math.exp(-step)
            self._norms[self._factors(round)] = min(LONGEST, max(SHORTEST, moved))

    def state_dict(self) -> dict[str, Any]:
        return dict(self._norms)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._norms = dict(state)

    def _factors(self, round: int) -> str:
        return adapters.factors(self._lora, round)
