"""What a round gets from a silo, or from a cohort of silos of whom the sum alone is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Contribution:
    """One silo's change of the shared tensors (new minus old), or a cohort's mean change."""

    name: str
    weight: float
    """What it counts for beside others: supervised tokens, or under masks the silos' sum of shares. Above 0."""
    change: Mapping[str, torch.Tensor]
    quality: float = 0.0
    """How well what the silo trained does on its held-out rows, 0 to 1, where the recipe weighs by it."""
