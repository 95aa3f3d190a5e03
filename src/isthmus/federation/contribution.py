"""What a round gets from a silo, or from a cohort of silos of whom the sum alone is known.

Shapes: N contributions, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from isthmus.model.flat import Layout


@dataclass(frozen=True)
class Contribution:
    """One silo's change of the shared tensors (new minus old), or a cohort's mean change."""

    name: str
    weight: float
    """What it counts for beside others: supervised tokens, or under masks the silos' sum of shares. Above 0."""
    change: Mapping[str, torch.Tensor]


def stacked(contributions: Sequence[Contribution], layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Their changes_NP (fp32) and weights_N (fp64, with the sum 1)."""
    changes_NP = torch.stack([layout.row(one.change) for one in contributions])
    weights_N = torch.tensor([one.weight for one in contributions], dtype=torch.float64)
    return changes_NP, weights_N / weights_N.sum()
