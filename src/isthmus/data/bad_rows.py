"""Rows that cannot be used: collected while all the others are read, so that one error counts them all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from isthmus.errors import DataError

NAMED = 5
"""Bad rows that an error names; of the others it gives the number."""


class BadRows:
    """The errors of bad rows and files, of which the first ``NAMED`` are kept."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[DataError] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep a ``DataError`` that is raised in the block, and go on after the block."""
        try:
            yield
        except DataError as error:
            self.count += 1
            if len(self._first) < NAMED:
                self._first.append(error)

    def raise_any(self) -> None:
        """Raise what was collected, as one error.

        Raises:
            DataError: anything was. The first few are named, with their places, the others counted.
        """
        if not self.count:
            return
        first = self._first[0]
        if self.count == 1:
            raise first
        named = "; ".join(error.message for error in self._first)
        rest = f"; and {self.count - len(self._first)} more" if self.count > len(self._first) else ""
        raise DataError(f"{self.count} rows or files are unusable: {named}{rest}", remedy=first.remedy)
