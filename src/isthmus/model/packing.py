"""Between padded batches, which models compute on, and packed sequences, which cross.

Shapes: B rows, L positions, T real tokens among them (in row order), D width.
"""

from __future__ import annotations

import torch


class Packing:
    """Which of the ``[B, L]`` positions of a padded batch hold real tokens."""

    def __init__(self, real_BL: torch.Tensor) -> None:
        self.real_BL = real_BL
        self.lengths: list[int] = real_BL.sum(dim=1).tolist()
        self.full = sum(self.lengths) == real_BL.numel()
        """No padding at all."""

    @classmethod
    def of_lengths(cls, lengths: list[int], device: torch.device, *, pad_left: bool) -> Packing:
        """The batch in which sequences of these lengths end (``pad_left``) or begin at the same position."""
        longest = max(lengths)
        place = torch.arange(longest, device=device)
        size = torch.tensor(lengths, device=device).unsqueeze(1)
        return cls(place >= longest - size if pad_left else place < size)

    def rows(self, ids_BL: torch.Tensor) -> list[list[int]]:
        """The real tokens' ids, row by row."""
        return [ids_L[real_L].tolist() for ids_L, real_L in zip(ids_BL, self.real_BL, strict=True)]

    def pack(self, h_BLD: torch.Tensor) -> torch.Tensor:
        """The real tokens, ``[T, D]``."""
        return h_BLD.flatten(0, 1) if self.full else h_BLD[self.real_BL]

    def unpack(self, h_TD: torch.Tensor, others_BLD: torch.Tensor | None = None) -> torch.Tensor:
        """The padded batch, ``[B, L, D]``; elsewhere zero, or what ``others_BLD`` has there."""
        rows, length = self.real_BL.shape
        if self.full:
            return h_TD.view(rows, length, -1)
        h_BLD = h_TD.new_zeros(rows, length, h_TD.shape[1]) if others_BLD is None else others_BLD
        return h_BLD.masked_scatter(self.real_BL.unsqueeze(-1), h_TD)
