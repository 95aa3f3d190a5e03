"""The records that a tensor's sequences belong to, with the noise factor of each row.

Shapes: T rows (tokens) of all sequences one after another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Subjects:
    """The records that a tensor's sequences belong to, with the noise factors of its rows and the records' budgets."""

    records: tuple[str, ...]
    """The name of each sequence's record, a keyed hash that means nothing outside the silo."""
    lengths: tuple[int, ...]
    """Number of rows of each sequence."""
    factors_T: torch.Tensor | None = None
    """Factor of each row's noise; None: 1 for all rows."""
    budgets: tuple[float, ...] | None = None
    """Largest epsilon of each sequence's record, in addition to the recipe's limit; None: none has one of its own."""

    @property
    def rows(self) -> int:
        """Number of rows of all sequences: T."""
        return sum(self.lengths)

    def of(self, index: int) -> Subjects:
        """The subjects of one sequence."""
        factors_T, budgets = self.factors_T, self.budgets
        if factors_T is not None:
            factors_T = torch.split(factors_T, list(self.lengths))[index]
        return Subjects(
            (self.records[index],),
            (self.lengths[index],),
            factors_T,
            None if budgets is None else (budgets[index],),
        )
