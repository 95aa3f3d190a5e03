"""The records that a tensor's sequences belong to, and how sensitive each of its rows is.

Shapes: T rows (tokens) of all sequences one after another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Subjects:
    """The records behind a tensor that leaves, and what the noise and the budgets of its rows follow from."""

    records: tuple[str, ...]
    """The record of each sequence, under a name that means nothing outside the silo."""
    lengths: tuple[int, ...]
    """Rows of each sequence."""
    factors_T: torch.Tensor | None = None
    """Factor of each row's noise; None: 1 for all."""
    budgets: tuple[float, ...] | None = None
    """The largest epsilon of each sequence's record, where it is below the recipe's; None: the recipe's for all."""

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    def of(self, place: int) -> Subjects:
        """Of the sequence at this place alone."""
        factors_T, budgets = self.factors_T, self.budgets
        if factors_T is not None:
            factors_T = torch.split(factors_T, list(self.lengths))[place]
        return Subjects(
            (self.records[place],),
            (self.lengths[place],),
            factors_T,
            None if budgets is None else (budgets[place],),
        )
