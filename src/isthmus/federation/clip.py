"""The largest norm of a round's updates, where their sum is noised: constant, or following a quantile of the norms.

Adaptive clipping after Andrew et al. (2021): each silo says whether its update was within the clip C, the sum of these
bits is noised like the update, and with b the part that said yes C becomes C·exp(-rate·(b - quantile)). So C finds the
norm that this part of the updates does not exceed, and no silo reveals its norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from isthmus.federation.collection import Collected
from isthmus.federation.sharing import Sharing
from isthmus.recipe import ClipSection
from isthmus.recipe.sections.federation.clip import LONGEST, SHORTEST


class Clip:
    """The largest L2 norm of an update, round by round.

    Rounds that train other factors of LoRA have clips of their own: B's changes are not as long as A's.

    Args:
        sharing: which factors a round trains.
    """

    def __init__(self, section: ClipSection, sharing: Sharing) -> None:
        self._section, self._sharing = section, sharing
        self._norms: dict[str, float] = {}

    def norm(self, round: int) -> float:
        """The largest L2 norm of this round's updates."""
        return self._norms.get(self._sharing.factors(round), self._section.norm)

    def follow(self, round: int, collected: Collected) -> None:
        """Move the clip by the part of this round's updates that were within it; without updates it stays."""
        if self._section.quantile is None or collected.sums is None or collected.total_KS is None:
            return
        within = collected.sums.within(collected.total_KS)
        if within is not None:
            step = self._section.rate * (min(1.0, max(0.0, within)) - self._section.quantile)
            moved = self.norm(round) * math.exp(-step)
            self._norms[self._sharing.factors(round)] = min(LONGEST, max(SHORTEST, moved))

    def state_dict(self) -> dict[str, Any]:
        return dict(self._norms)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._norms = dict(state)
