"""The format of one sum of updates: how a silo writes its change as whole numbers, and how the sum is read.

A silo's numbers are those of its change, each times its share, then, in some sums, one indicator, then its share. The
sum of the first divided by the sum of the last is the weighted mean of the changes.

Shapes: P parameters, K numbers that cross of them, S digits of a share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from isthmus.updates.flat import Layout
from isthmus.updates.projections import Projection
from isthmus.updates.quantize import Integers, Ring, Whole


@dataclass(frozen=True)
class SumFormat:
    """The format of one sum, the same for all silos in it and for whoever reads it.

    Args:
        layout: of the change as one row, P.
        projection: makes P numbers K; None: all P cross.
        indicators: numbers between change and share: 1 where silos say whether their update was within the clip.
    """

    layout: Layout
    ring: Ring
    projection: Projection | None = None
    indicators: int = 0

    @cached_property
    def count(self) -> int:
        """K."""
        return self.layout.size if self.projection is None else self.projection.size

    @cached_property
    def size(self) -> int:
        """Numbers that a silo sends: K, the indicators and S."""
        return self.count + self.indicators + self.ring.digits

    def project(self, row_P: torch.Tensor) -> torch.Tensor:
        """The numbers that cross of this row, K."""
        return row_P if self.projection is None else self.projection.project(row_P)

    def lift(self, values_K: torch.Tensor) -> torch.Tensor:
        """The row that these numbers, or sums of them, stand for, P, in their dtype."""
        return values_K if self.projection is None else self.projection.lift(values_K)

    def encode(self, row_P: torch.Tensor, share: float) -> Whole:
        """A silo's whole numbers in a sum without indicators: its row's, times the share, then the share's; K + S."""
        whole_KS = np.empty(self.count + self.ring.digits, np.int32)
        self.ring.encode(self.project(row_P).numpy(), times=share, out=whole_KS[: self.count])
        whole_KS[self.count :] = self.ring.encode_share(share)
        return whole_KS

    def decode(self, whole_KS: Whole, share: float) -> torch.Tensor:
        """The row, fp32, P, that one silo's encoded numbers stand for."""
        return self.lift(torch.from_numpy(self.ring.decode(whole_KS[: self.count]) / share).float())

    def mean(self, total_KS: Integers) -> tuple[float, dict[str, torch.Tensor]] | None:
        """The sum of the shares, and the mean of the changes weighted by them; None if the shares add up to nothing."""
        weight = self._weight(total_KS)
        if weight <= 0:
            return None
        mean_K = torch.from_numpy(total_KS[: self.count] * (self.ring.step / weight))
        return weight, self.layout.tensors(self.lift(mean_K))

    def within(self, total_KS: Integers) -> float | None:
        """The part of the silos whose update was within the clip, by the sum of their indicators; noise can take it
        below 0 and above 1. None in a sum without indicators."""
        weight = self._weight(total_KS)
        if not self.indicators or weight <= 0:
            return None
        return (1 + float(total_KS[self.count]) / (self.ring.levels * weight)) / 2

    def _weight(self, total_KS: Integers) -> float:
        return self.ring.decode_share(total_KS[len(total_KS) - self.ring.digits :])
