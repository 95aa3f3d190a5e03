"""Named tensors as one row of numbers, in the order of their names.

Shapes: P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

Tensors = Mapping[str, torch.Tensor]


class Layout:
    """The place of each tensor in the row."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = {name: shapes[name] for name in sorted(shapes)}
        self._sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.size = sum(self._sizes)
        """P."""

    @classmethod
    def of(cls, tensors: Tensors) -> Layout:
        """The layout of these tensors."""
        return cls({name: tuple(tensor.shape) for name, tensor in tensors.items()})

    def row(self, tensors: Tensors) -> torch.Tensor:
        """These tensors' values, fp32, P."""
        return torch.cat([torch.zeros(0), *(tensors[name].detach().float().reshape(-1).cpu() for name in self.shapes)])

    def tensors(self, row_P: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of this row, of its dtype; views of it."""
        pieces = torch.split(row_P, self._sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}
