"""``[federation.weights]``: how much each silo counts."""

from __future__ import annotations

from typing import Literal

from isthmus.recipe.section import Bound, Section

FROM_UPDATES = ("agreement", "inverse-variance")
"""Weights that the root computes from single updates."""


class WeightsSection(Section):
    """How much each silo counts in a round; ``weights = "equal"`` sets kind."""

    main = "kind"

    kind: Literal["examples", "equal", "agreement", "inverse-variance", "quality"] = "examples"
    """"examples": by its answers' tokens (task.choices all count as the longest); with masks by the share of its
    planned rows. "equal": all alike. "agreement": by how far its change points where the others' do.
    "inverse-variance": by one over the variance of its change around the mean. "quality": by how well the adapters
    that it trained do on its own held-out rows, and in how many rounds it took part. The last three are
    experimental: not measured on a real model."""
    bound: Bound = 2.0
    """Largest weight of a silo, as a multiple of an equal share; "agreement", "inverse-variance" and "quality"."""

    @property
    def claimed(self) -> bool:
        """Whether weights follow from what silos report rather than from what the root computes."""
        return self.kind in ("examples", "equal")
