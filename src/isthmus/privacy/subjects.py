"""Whom a tensor is about: which record each of its sequences belongs to, and how sensitive each row is.

Shapes: T rows (tokens) of all sequences one after another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Subjects:
    """What the boundary must know of a tensor's rows beside their values."""

    records: tuple[str, ...]
    """The record of each sequence, under a name that means nothing outside the silo."""
    lengths: tuple[int, ...]
    """Rows of each sequence."""
    factors_T: torch.Tensor | None = None
    """By what each row's noise is multiplied; None: 1 for all."""
    budgets: tuple[float, ...] | None = None
    """The largest epsilon of each sequence's record, where it is below the recipe's; None: the recipe's for all."""

    @property
    def rows(self) -> int:
        return sum(self.lengths)
