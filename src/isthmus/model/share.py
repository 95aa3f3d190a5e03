"""A process's share of a weight, where several processes hold the linear layers of a part together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from isthmus.errors import NotSupportedError


@dataclass(frozen=True)
class RowShare:
    """The rows (outputs) of each weight that one of several processes holds, one after another by rank.

    Args:
        rank: the process's number, from 0.
        ranks: how many there are.
    """

    rank: int
    ranks: int

    def rows(self, total: int) -> slice:
        """Its rows of a weight that has so many in all. Numbers of rows differ by one at most."""
        return slice(total * self.rank // self.ranks, total * (self.rank + 1) // self.ranks)

    def size(self, total: int) -> int:
        """How many rows of a weight it holds."""
        rows = self.rows(total)
        return int(rows.stop - rows.start)

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """Its rows of a weight, as a view."""
        return weight[self.rows(len(weight))]

    def check(self, outputs: Mapping[str, int]) -> None:
        """Refuse shares without a row.

        Args:
            outputs: the number of rows of each layer, by name.

        Raises:
            NotSupportedError: a layer has fewer rows than there are ranks.
        """
        name = min(outputs, key=outputs.__getitem__, default=None)
        if name is not None and outputs[name] < self.ranks:
            raise NotSupportedError(
                f"{self.ranks} ranks cannot share the {outputs[name]} rows of {name}",
                remedy=f"start {outputs[name]} ranks at most",
            )
