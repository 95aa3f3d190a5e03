"""Look-up of the token that followed the same context earlier (prompt lookup)."""

from __future__ import annotations

from collections.abc import Sequence

MAX_CONTEXT = 4
"""Largest number of context tokens that are compared."""


class Lookup:
    """An index from each context of 1 to ``MAX_CONTEXT`` tokens to the token that followed its last occurrence."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}

    def add(self, ids: Sequence[int], start: int = 0) -> None:
        """Index the tokens of a text from index ``start`` on."""
        for position in range(max(1, start), len(ids)):
            for size in range(1, min(MAX_CONTEXT, position) + 1):
                self._next[tuple(ids[position - size : position])] = ids[position]

    def find(self, ids: Sequence[int], min_context: int = 1) -> tuple[int, int] | None:
        """The token that followed the longest known context at the end of ``ids``.

        Args:
            min_context: smallest number of context tokens.

        Returns:
            The token and the number of context tokens; None if no context is known.
        """
        for size in range(min(MAX_CONTEXT, len(ids)), min_context - 1, -1):
            token = self._next.get(tuple(ids[len(ids) - size :]))
            if token is not None:
                return token, size
        return None
