"""The register: tells the boundary whom tensors are about, from the tokens behind them."""

from __future__ import annotations

import hashlib
import itertools
import secrets
from array import array
from dataclasses import replace

from isthmus.privacy.subjects import Subjects


class Register:
    """Finds the record of each sequence that crosses.

    A record's name is a keyed hash of its tokens: the same text has the same record, and names in a ledger do not
    give guesses of the text away to whoever lacks the key.

    Args:
        key: secret of the silo; by default one that lasts as long as the process.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key or secrets.token_bytes(32)
        self._unknown = itertools.count(1)

    def subjects(self, rows: list[list[int]] | None, lengths: list[int]) -> Subjects:
        """Whom a tensor is about.

        Args:
            rows: token ids of each whole sequence so far; None where the model was given embeddings: then every
                sequence is a record of its own.
            lengths: of each sequence, how many of its last tokens cross.
        """
        if rows is None:
            return Subjects(tuple(f"unknown-{next(self._unknown)}" for _ in lengths), tuple(lengths))
        return Subjects(tuple(self._record(row) for row in rows), tuple(lengths))

    def history(self, rows: int) -> History:
        """Of a generation of so many rows."""
        return History(self, rows)

    def _record(self, row: list[int]) -> str:
        return hashlib.blake2b(array("q", row).tobytes(), key=self._key, digest_size=8).hexdigest()


class History:
    """What the rows of one generation have said so far. A row's record is that of its prompt, however it goes on."""

    def __init__(self, register: Register, rows: int) -> None:
        self._register = register
        self._tokens: list[list[int]] | None = [[] for _ in range(rows)]
        """None once embeddings came without tokens."""
        self._records: tuple[str, ...] = ()

    def subjects(self, rows: list[list[int]] | None, lengths: list[int]) -> Subjects:
        """Whom the next tensor is about.

        Args:
            rows: the new tokens of each row, or None.
            lengths: how many of them cross.
        """
        if rows is None or self._tokens is None:
            self._tokens = None
        else:
            self._tokens = [[*old, *new] for old, new in zip(self._tokens, rows, strict=True)]
        subjects = self._register.subjects(self._tokens, lengths)
        self._records = self._records or subjects.records
        return replace(subjects, records=self._records)

    def forget(self, positions: int) -> None:
        """Drop this many tokens from the end of every row."""
        if self._tokens is not None:
            self._tokens = [row[: len(row) - positions] for row in self._tokens]

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self._records = tuple(self._records[row] for row in rows)
        if self._tokens is not None:
            self._tokens = [self._tokens[row] for row in rows]
