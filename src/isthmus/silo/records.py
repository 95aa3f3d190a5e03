"""The records: tells the boundary whom tensors are about and how sensitive they are, from the tokens behind them."""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

import torch

from isthmus.data.tokens import Tokens
from isthmus.errors import RunError
from isthmus.privacy.detokenizer import Decode, Detokenizer
from isthmus.privacy.sensitivity import Sensitivity
from isthmus.privacy.subjects import Subjects
from isthmus.silo.secrets import read_secret
from isthmus.storage.record import disk_errors, writing

ROWS = 16384
"""Rows whose classes are remembered."""
Row = list[int]


@dataclass
class Known:
    """A prompt of the silo's own data, and what its rows answer."""

    length: int
    classes: tuple[int, ...] = ()
    """Of the prompt's tokens, where they are asked for."""
    answers: list[tuple[Row, tuple[int, ...]]] = field(default_factory=list)
    found: set[int] = field(default_factory=set)
    """All classes in prompt and answers."""


class Records:
    """Finds the record and the classes of each sequence that crosses.

    A record's name is a keyed hash of its prompt: whatever is answered, a row of the silo's data stays one record, and
    names in a ledger do not give guesses of the text away to whoever lacks the key. A sequence that begins with no
    prompt of the data is a record of its own.

    Args:
        folder: where the key and the scale of the noise are kept, in the silo's own directory; None: they last as long
            as the process.
        sensitivity: says how sensitive text is; None: all alike.
        decode: text of tokens; needed with ``sensitivity``.
    """

    def __init__(
        self, folder: Path | None = None, sensitivity: Sensitivity | None = None, decode: Decode | None = None
    ) -> None:
        self.sensitivity = sensitivity
        self._decode = decode
        self._folder = folder
        self._key = secrets.token_bytes(32) if folder is None else read_secret(folder / "record-key")
        self._unknown = itertools.count(1)
        self._known: dict[str, Known] = {}
        self._lengths: list[int] = []
        self._scale = self._kept_scale()
        self._classes = lru_cache(ROWS)(self._classes_of)
        classes = {} if sensitivity is None else sensitivity.section.classes
        self.limited = any(one.epsilon is not None for one in classes.values())
        """Whether a class of sensitive text limits what a record is charged."""

    def learn(self, rows: Iterable[Tokens], train: Iterable[Tokens] = (), tail: int | None = None) -> None:
        """Know these rows of the silo's data.

        Args:
            train: those that train: over what crosses of them, the mean power of the noise is the boundary's.
            tail: how many of a prompt's last tokens cross; None: all.
        """
        for row in rows:
            known = self._known.setdefault(self._name(row.prompt), Known(len(row.prompt)))
            if row.classes is not None:
                own = row.classes[: known.length]
                known.classes = tuple(map(max, known.classes, own)) if known.classes else own
                known.found |= set(row.classes)
                known.answers.append((row.answer, row.classes[known.length :]))
        self._lengths = sorted({known.length for known in self._known.values()})
        self._classes.cache_clear()
        if self.sensitivity is not None and self._scale is None:
            self._keep_scale(self.sensitivity.root_mean_square(_crossing(train, tail)))

    def subjects(self, rows: list[Row] | None, lengths: list[int]) -> Subjects:
        """Whom a tensor is about.

        Args:
            rows: token ids of each whole sequence so far; None where the model was given embeddings: then every
                sequence is a record of its own, and nothing in it sensitive.
            lengths: of each sequence, how many of its last tokens cross.

        Raises:
            DataError: the silo's own sensitivity function failed.
        """
        if rows is None:
            unknown = tuple(f"unknown-{next(self._unknown)}" for _ in lengths)
            return self.weighed(Subjects(unknown, tuple(lengths)), [[0] * length for length in lengths])
        subjects = Subjects(self.records(rows), tuple(lengths))
        return subjects if self.sensitivity is None else self.weighed(subjects, self.classes(rows))

    def weighed(self, subjects: Subjects, classes: list[list[int]] | None) -> Subjects:
        """The same with factors and budgets, by the classes of each whole sequence; they cross with their last."""
        if self.sensitivity is None or classes is None:
            return subjects
        crossing = [row[len(row) - length :] for row, length in zip(classes, subjects.lengths, strict=True)]
        numbers_T = torch.tensor([number for row in crossing for number in row], dtype=torch.long)
        factors_T = self.sensitivity.weights[numbers_T] / (self._scale or 1.0)
        known = [self._known[record].found if record in self._known else set() for record in subjects.records]
        budgets = [self.sensitivity.epsilon({*row, *more}) for row, more in zip(classes, known, strict=True)]
        return replace(subjects, factors_T=factors_T, budgets=tuple(budgets))

    def records(self, rows: list[Row]) -> tuple[str, ...]:
        """The record of each whole sequence."""
        return tuple(self._prompt_of(row) or self._name(row) for row in rows)

    def classes(self, rows: list[Row]) -> list[list[int]] | None:
        """The classes of each whole sequence's tokens; None where nobody asks for them."""
        return None if self.sensitivity is None else [list(self._classes(tuple(row))) for row in rows]

    def reading(self, row: Row) -> Detokenizer:
        """A sequence that will go on, with what the data says of its beginning."""
        assert self.sensitivity is not None
        assert self._decode is not None
        reading = Detokenizer(self.sensitivity, self._decode)
        reading.extend(row)
        reading.raise_to(self._beginning(row))
        return reading

    def history(self, rows: int) -> History:
        """Of a generation of so many rows."""
        return History(self, rows)

    def _classes_of(self, row: tuple[int, ...]) -> list[int]:
        known = self._beginning(list(row))
        return known if len(known) == len(row) else self.reading(list(row)).classes

    def _beginning(self, row: Row) -> list[int]:
        """Classes of as many of the first tokens as the data knows."""
        name = self._prompt_of(row)
        if name is None:
            return []
        known = self._known[name]
        rest = row[known.length :]
        same = [
            classes[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(answer, rest, strict=False)))]
            for answer, classes in known.answers
        ]
        return [*known.classes, *max(same, key=len, default=())]

    def _prompt_of(self, row: Row) -> str | None:
        """The name of the longest known prompt that the row begins with."""
        found, done = None, 0
        digest = hashlib.blake2b(key=self._key, digest_size=8)
        tokens = array("q", row)
        for length in self._lengths[: bisect_right(self._lengths, len(row))]:
            digest.update(tokens[done:length].tobytes())
            done, name = length, digest.copy().hexdigest()
            found = name if name in self._known else found
        return found

    def _name(self, row: Row) -> str:
        return hashlib.blake2b(array("q", row).tobytes(), key=self._key, digest_size=8).hexdigest()

    def _kept_scale(self) -> float | None:
        """What this silo found before, with the same section of the recipe."""
        if self._folder is None or self.sensitivity is None or not (path := self._folder / "sensitivity.json").exists():
            return None
        try:
            kept = json.loads(path.read_text())
            scale, same = float(kept["scale"]), kept["section"] == self.sensitivity.section.model_dump(mode="json")
            if not 0 < scale < float("inf"):
                raise ValueError(scale)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunError(f"{path} is damaged", remedy="delete it: it is computed again from the data") from error
        return scale if same else None

    def _keep_scale(self, scale: float) -> None:
        self._scale = scale
        if self._folder is not None and self.sensitivity is not None:
            path = self._folder / "sensitivity.json"
            section = self.sensitivity.section.model_dump(mode="json")
            with disk_errors(path), writing(path) as temporary:
                temporary.write_text(json.dumps({"scale": scale, "section": section}))


class History:
    """What the rows of one generation have said so far. A row's record is that of its prompt, however it goes on."""

    def __init__(self, records: Records, rows: int) -> None:
        self._known_to = records
        self._lengths: list[int] | None = [0] * rows
        """Tokens of each row; None once embeddings came without tokens."""
        self._records: tuple[str, ...] = ()
        self._readings: list[Detokenizer] = []
        self._heard: list[Row] | None = None
        """New tokens that ``subjects`` need not add, since they were told before."""

    def hear(self, rows: list[Row] | None) -> list[list[int]] | None:
        """Go on with these tokens; returns the classes of all rows, from their beginnings.

        Args:
            rows: the new tokens of each row, or None.
        """
        if rows is None or self._lengths is None:
            self._lengths, self._heard, self._readings = None, None, []
            return None
        first = not self._records
        if first:
            self._records = self._known_to.records(rows)
        self._lengths = [old + len(new) for old, new in zip(self._lengths, rows, strict=True)]
        self._heard = rows
        if self._known_to.sensitivity is None:
            return None
        if first:
            self._readings = [self._known_to.reading(row) for row in rows]
        else:
            for reading, row in zip(self._readings, rows, strict=True):
                reading.extend(row)
        return [reading.classes for reading in self._readings]

    def subjects(self, rows: list[Row] | None, lengths: list[int]) -> Subjects:
        """Whom the next tensor is about.

        Args:
            rows: the new tokens of each row, or None.
            lengths: how many of them cross.
        """
        if self._heard is None:
            self.hear(rows)
        heard, self._heard = self._heard, None
        if rows is None or heard is None:
            subjects = self._known_to.subjects(None, lengths)
            self._records = self._records or subjects.records
            return replace(subjects, records=self._records)
        classes = None
        if self._known_to.sensitivity is not None:
            late = [len(told) - len(row) for told, row in zip(heard, rows, strict=True)]
            pairs = zip(self._readings, late, strict=True)
            classes = [reading.classes[: len(reading) - dropped] for reading, dropped in pairs]
        return self._known_to.weighed(Subjects(self._records, tuple(lengths)), classes)

    def crop(self, positions: int) -> None:
        """Drop this many tokens from the end of every row."""
        if self._lengths is not None:
            self._lengths = [length - positions for length in self._lengths]
        for reading in self._readings:
            reading.forget(positions)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self._records = tuple(self._records[row] for row in rows)
        self._readings = [self._readings[row].copy() for row in rows] if self._readings else []
        if self._lengths is not None:
            self._lengths = [self._lengths[row] for row in rows]


def _crossing(rows: Iterable[Tokens], tail: int | None) -> Iterable[int]:
    """Classes of the tokens that cross in training: all but a row's last, and of its prompt no more than the tail."""
    for row in rows:
        prompt = len(row.prompt)
        first = 0 if tail is None else max(0, prompt - tail)
        last = max(first + 1, prompt + len(row.answer) - 1)
        yield from (row.classes or ())[first:last]
