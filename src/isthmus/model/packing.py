"""Conversion between padded batches, which models compute on, and packed sequences, which cross.

Shapes: B rows, L positions, T real tokens among them (in row order), D width, N positions of the longest row.
"""

from __future__ import annotations

import torch


class Packing:
    """The ``[B, L]`` positions of a padded batch that hold real tokens, and the sequences that they make up.

    Args:
        real_BL: bool, true for real tokens.
        starts_BL: bool, true for the first token of each sequence, in a batch without padding of which a row may hold
            several sequences; None: each row is one.
    """

    def __init__(self, real_BL: torch.Tensor, starts_BL: torch.Tensor | None = None) -> None:
        self.real_BL = real_BL
        self._starts_BL = starts_BL
        self.lengths: list[int] = real_BL.sum(dim=1).tolist() if starts_BL is None else _lengths(starts_BL)
        """Number of real tokens of each sequence."""
        self.full = sum(self.lengths) == real_BL.numel()
        """Whether there is no padding."""

    def starts(self) -> torch.Tensor:
        """Mask of the first token of each sequence, ``[B, L]`` bool."""
        if self._starts_BL is None:
            return self.real_BL & (self.real_BL.cumsum(dim=1) == 1)
        return self._starts_BL

    @classmethod
    def of_lengths(cls, lengths: list[int], device: torch.device, *, pad_left: bool) -> Packing:
        """The packing of a batch of sequences of these lengths, padded on the left or on the right."""
        longest = max(lengths)
        place = torch.arange(longest, device=device)
        size = torch.tensor(lengths, device=device).unsqueeze(1)
        return cls(place >= longest - size if pad_left else place < size)

    def rows(self, ids_BL: torch.Tensor) -> list[list[int]]:
        """The ids of each sequence's real tokens."""
        if self._starts_BL is not None:
            return [piece.tolist() for piece in torch.split(ids_BL.flatten(), self.lengths)]
        if self.full:
            return ids_BL.tolist()
        return [ids_L[real_L].tolist() for ids_L, real_L in zip(ids_BL, self.real_BL, strict=True)]

    def pack(self, h_BLD: torch.Tensor) -> torch.Tensor:
        """The states at real tokens, row after row, ``[T, D]``."""
        return h_BLD.flatten(0, 1) if self.full else h_BLD[self.real_BL]

    def unpack(self, h_TD: torch.Tensor, others_BLD: torch.Tensor | None = None) -> torch.Tensor:
        """The padded batch, ``[B, L, D]``. Positions without a real token are zero, or those of ``others_BLD``."""
        rows, length = self.real_BL.shape
        if self.full:
            return h_TD.view(rows, length, -1)
        h_BLD = h_TD.new_zeros(rows, length, h_TD.shape[1]) if others_BLD is None else others_BLD
        return h_BLD.masked_scatter(self.real_BL.unsqueeze(-1), h_TD)


def _lengths(starts_BL: torch.Tensor) -> list[int]:
    """Number of tokens from each start to the next; each row begins with a start."""
    begins = starts_BL.flatten().nonzero().flatten()
    lengths: list[int] = begins.diff(append=begins.new_tensor([starts_BL.numel()])).tolist()
    return lengths


class Padding:
    """Conversion of packed sequences to rows of equal length. Lengths are given, so it never waits for a device.

    A row is padded with its own last token, so that a NaN stays in its own sequence.
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
        """The states with dimension ``dim`` of size T replaced by two dimensions of sizes B and N."""
        filled = states if self._even else states.index_select(dim, self._taken)
        return filled.view(*filled.shape[:dim], *self._shape, *filled.shape[dim + 1 :])

    def unpad(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """The inverse of ``pad``: the dimensions ``dim`` (B) and ``dim + 1`` (N) become one of size T."""
        flat = states.flatten(dim, dim + 1)
        return flat if self._even else flat.index_select(dim, self._real)
