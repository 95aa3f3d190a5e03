"""Looking up how a text went on where its last tokens stood before."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 4
"""Tokens of context that are looked for, at most."""


class Lookup:
    """The token that followed each run of one to ``LONGEST`` tokens the last time."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}

    def learn(self, ids: Sequence[int], start: int = 0) -> None:
        """Note what this text has from ``start`` on."""
        for place in range(max(1, start), len(ids)):
            for size in range(1, min(LONGEST, place) + 1):
                self._next[tuple(ids[place - size : place])] = ids[place]

    def find(self, ids: Sequence[int], least: int = 1) -> tuple[int, int] | None:
        """The token to expect after ``ids`` and how many of their last tokens stood before it; None if none did."""
        for size in range(min(LONGEST, len(ids)), least - 1, -1):
            token = self._next.get(tuple(ids[len(ids) - size :]))
            if token is not None:
                return token, size
        return None
