"""The transcript of a generation: the trunk's inputs and outputs at each position. It never leaves the silo.

Shapes: B rows, L positions, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TranscriptSlice:
    """The hidden states at consecutive positions."""

    h_BLD: torch.Tensor
    """Bottom's output."""
    g_BLD: torch.Tensor
    """The trunk's output."""
    real_BL: torch.Tensor
    """True where a position crossed."""


class Transcript:
    """All hidden states exchanged with the trunk in one generation. A ``SplitCache`` crops and reorders it."""

    def __init__(self) -> None:
        self._pieces: list[TranscriptSlice] = []

    def __len__(self) -> int:
        """Number of recorded positions."""
        return sum(piece.real_BL.shape[1] for piece in self._pieces)

    def add(self, h_BLD: torch.Tensor, g_BLD: torch.Tensor, real_BL: torch.Tensor) -> None:
        """Append new positions; arguments as in ``TranscriptSlice``."""
        self._pieces.append(TranscriptSlice(h_BLD.detach(), g_BLD.detach(), real_BL))

    def crop(self, positions: int) -> None:
        """Drop this many positions from the end."""
        while positions and self._pieces:
            last = self._pieces.pop()
            kept = last.real_BL.shape[1] - positions
            positions = max(0, -kept)
            if kept > 0:
                self._pieces.append(TranscriptSlice(last.h_BLD[:, :kept], last.g_BLD[:, :kept], last.real_BL[:, :kept]))

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self._pieces = [TranscriptSlice(one.h_BLD[rows], one.g_BLD[rows], one.real_BL[rows]) for one in self._pieces]

    def slice(self, start: int = 0) -> TranscriptSlice:
        """All positions from ``start`` on. There must be at least one."""
        pieces, past = [], 0
        for piece in self._pieces:
            skip = max(0, start - past)
            past += piece.real_BL.shape[1]
            if past > start:
                pieces.append(TranscriptSlice(piece.h_BLD[:, skip:], piece.g_BLD[:, skip:], piece.real_BL[:, skip:]))
        return TranscriptSlice(
            torch.cat([piece.h_BLD for piece in pieces], dim=1),
            torch.cat([piece.g_BLD for piece in pieces], dim=1),
            torch.cat([piece.real_BL for piece in pieces], dim=1),
        )
