"""Between padded batches, which models compute on, and packed sequences, which cross.

Shapes: B rows, L positions, T real tokens among them (in row order), D width, N positions of the longest row.
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
        if self.full:
            return ids_BL.tolist()
        return [ids_L[real_L].tolist() for ids_L, real_L in zip(ids_BL, self.real_BL, strict=True)]

    def pack(self, h_BLD: torch.Tensor) -> torch.Tensor:
        """The real tokens, ``[T, D]``."""
        return h_BLD.flatten(0, 1) if self.full else h_BLD[self.real_BL]

    def unpack(self, h_TD: torch.Tensor, others_BLD: torch.Tensor | None = None) -> torch.Tensor:
        """The padded batch, ``[B, L, D]``; at other positions zero, or the values of ``others_BLD``."""
        rows, length = self.real_BL.shape
        if self.full:
            return h_TD.view(rows, length, -1)
        h_BLD = h_TD.new_zeros(rows, length, h_TD.shape[1]) if others_BLD is None else others_BLD
        return h_BLD.masked_scatter(self.real_BL.unsqueeze(-1), h_TD)


class Padding:
    """Packed sequences as rows of one length. Unlike ``Packing`` it asks a device nothing: lengths are known here.

    A row is filled up with its own last token, so that a NaN of one sequence stays in that sequence.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self._shape = len(lengths), max(lengths)
        self._even = min(lengths) == max(lengths)
        size_B1 = torch.tensor(lengths).unsqueeze(1)
        place_N = torch.arange(max(lengths))
        start_B1 = size_B1.cumsum(dim=0) - size_B1
        self._taken = (start_B1 + torch.minimum(place_N, size_B1 - 1)).flatten().to(device)
        self._real = (place_N < size_B1).flatten().nonzero().flatten().to(device)

    def pad(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """``T`` tokens in this dimension become ``B, N``."""
        filled = states if self._even else states.index_select(dim, self._taken)
        return filled.view(*filled.shape[:dim], *self._shape, *filled.shape[dim + 1 :])

    def unpad(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """``B, N`` from this dimension on become ``T`` tokens again."""
        flat = states.flatten(dim, dim + 1)
        return flat if self._even else flat.index_select(dim, self._real)
