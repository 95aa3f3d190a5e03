"""The transcript: what a generation sent into the trunk and got back, position by position. It never leaves the silo.

Shapes: B rows, L positions, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Heard:
    """A stretch of positions: bottom's result, the trunk's answer to it, and which of them hold real tokens."""

    h_BLD: torch.Tensor
    g_BLD: torch.Tensor
    real_BL: torch.Tensor


class Transcript:
    """Kept beside a ``SplitCache`` and cropped and reordered with it."""

    def __init__(self) -> None:
        self._pieces: list[Heard] = []

    def __len__(self) -> int:
        """Positions on the transcript."""
        return sum(piece.real_BL.shape[1] for piece in self._pieces)

    def add(self, h_BLD: torch.Tensor, g_BLD: torch.Tensor, real_BL: torch.Tensor) -> None:
        self._pieces.append(Heard(h_BLD.detach(), g_BLD.detach(), real_BL))

    def crop(self, positions: int) -> None:
        """Drop this many positions from the end."""
        while positions and self._pieces:
            last = self._pieces.pop()
            kept = last.real_BL.shape[1] - positions
            positions = max(0, -kept)
            if kept > 0:
                self._pieces.append(Heard(last.h_BLD[:, :kept], last.g_BLD[:, :kept], last.real_BL[:, :kept]))

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self._pieces = [Heard(one.h_BLD[rows], one.g_BLD[rows], one.real_BL[rows]) for one in self._pieces]

    def heard(self, start: int = 0) -> Heard:
        """Everything from this position on, in one piece; there must be some."""
        pieces, past = [], 0
        for piece in self._pieces:
            skip = max(0, start - past)
            past += piece.real_BL.shape[1]
            if past > start:
                pieces.append(Heard(piece.h_BLD[:, skip:], piece.g_BLD[:, skip:], piece.real_BL[:, skip:]))
        return Heard(
            torch.cat([piece.h_BLD for piece in pieces], dim=1),
            torch.cat([piece.g_BLD for piece in pieces], dim=1),
            torch.cat([piece.real_BL for piece in pieces], dim=1),
        )
