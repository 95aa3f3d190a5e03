"""A round's contributions: one silo's change, or the mean change of a cohort whose sum alone is known.

Shapes: N contributions, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from isthmus.updates.flat import Layout


@dataclass(frozen=True)
class Contribution:
    """One silo's change of the shared tensors (new minus old), or a cohort's mean change."""

    name: str
    weight: float
    """Its weight in the mean: tokens of its answers, or under masks the sum of the silos' shares. Above 0."""
    change: Mapping[str, torch.Tensor]
    quality: float = 0.0
    """The quality of the silo's model on its held-out rows, 0 to 1, where the recipe weighs by it."""


def changes(contributions: Sequence[Contribution], layout: Layout) -> torch.Tensor:
    """Their changes, fp32, N × P."""
    return torch.stack([layout.row(one.change) for one in contributions])


def proportions(contributions: Sequence[Contribution], most: float = math.inf) -> torch.Tensor:
    """Their weights, none above the most, in proportion: fp64, N, with the sum 1."""
    weights_N = torch.tensor([min(one.weight, most) for one in contributions], dtype=torch.float64)
    return weights_N / weights_N.sum()
