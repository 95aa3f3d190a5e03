"""The records that token sequences belong to, and the sensitivity of their tokens."""

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
from isthmus.storage.files import disk_errors, writing

CACHED_ROWS = 16384
"""Number of rows whose classes are cached."""
TokenIds = list[int]
"""The token ids of one sequence, without padding."""


@dataclass
class KnownPrompt:
    """A prompt of the silo's own data, with the answers of its rows."""

    length: int
    """Number of the prompt's tokens."""
    classes: tuple[int, ...] = ()
    """Sensitivity class of each of the prompt's tokens; empty without sensitivity."""
    answers: list[tuple[TokenIds, tuple[int, ...]]] = field(default_factory=list)
    """Token ids and sensitivity classes of each answer, and of what is read of it in training; empty without
    sensitivity."""
    found: set[int] = field(default_factory=set)
    """All sensitivity classes in prompt and answers."""


class Records:
    """Maps each sequence that crosses to its record and its tokens to sensitivity classes.

    A record's name is a keyed hash of its prompt. A row of the silo's data is therefore the same record whatever the
    answer, and nobody without the key can check a guess of the text against the names in a ledger. All turns of a
    conversation are one record, that of the first. A sequence that starts with no prompt of the data is a record of
    its own.

    Args:
        folder: folder, in the silo's own directory, for the key and the noise scale; None: they end with the process.
        sensitivity: classifies text; None: all text is equally sensitive.
        decode: converts token ids to text; required with ``sensitivity``.
    """

    def __init__(
        self, folder: Path | None = None, sensitivity: Sensitivity | None = None, decode: Decode | None = None
    ) -> None:
        self.sensitivity = sensitivity
        self._decode = decode
        self._folder = folder
        self._key = secrets.token_bytes(32) if folder is None else read_secret(folder / "record-key")
        self._unnamed = itertools.count(1)
        self._known: dict[str, KnownPrompt] = {}
        self._owners: dict[str, str] = {}
        """The record of each prompt that is a turn of a conversation."""
        self._lengths: list[int] = []
        self._scale = self._read_scale()
        self._classes = lru_cache(CACHED_ROWS)(self._classes_of)
        classes = {} if sensitivity is None else sensitivity.section.classes
        self.limited = any(one.epsilon is not None for one in classes.values())
        """Whether a sensitivity class sets a privacy budget for its records."""

    def add_rows(self, rows: Iterable[Tokens], train: Iterable[Tokens] = (), tail: int | None = None) -> None:
        """Add rows of the silo's data, whose prompts then identify records.

        Args:
            train: the training rows. Noise is scaled so that its mean power over their crossing tokens is the
                boundary's; a scale read from ``folder`` takes precedence.
            tail: number of a prompt's last tokens that cross; None: all.
        """
        conversations: dict[str, str] = {}
        for row in rows:
            name = self._name(row.prompt)
            known = self._known.setdefault(name, KnownPrompt(len(row.prompt)))
            if row.conversation:
                owner = conversations.setdefault(row.conversation, self._owners.get(name, name))
                self._owners.setdefault(name, owner)
            if row.classes is not None:
                own = row.classes[: known.length]
                known.classes = tuple(map(max, known.classes, own)) if known.classes else own
                known.found |= set(row.classes)
                self._known[self._owners.get(name, name)].found |= set(row.classes)
                known.answers.append((row.answer, row.classes[known.length :]))
                if row.filler:
                    known.answers.append((row.input[known.length :], row.input_classes[known.length :]))
        self._lengths = sorted({known.length for known in self._known.values()})
        self._classes.cache_clear()
        if self.sensitivity is not None and self._scale is None:
            self._write_scale(self.sensitivity.root_mean_square(_crossing_classes(train, tail)))

    def subjects(self, rows: list[TokenIds] | None, lengths: list[int]) -> Subjects:
        """The records that a tensor's sequences belong to.

        Args:
            rows: token ids of each whole sequence so far; None for embeddings: each sequence is then a new record
                without sensitive tokens.
            lengths: number of each sequence's last tokens that cross.

        Raises:
            DataError: the silo's own sensitivity function failed.
        """
        if rows is None:
            unknown = tuple(f"unknown-{next(self._unnamed)}" for _ in lengths)
            return self.with_sensitivity(Subjects(unknown, tuple(lengths)), [[0] * length for length in lengths])
        subjects = Subjects(self.record_names(rows), tuple(lengths))
        return subjects if self.sensitivity is None else self.with_sensitivity(subjects, self.classes(rows))

    def with_sensitivity(self, subjects: Subjects, classes: list[list[int]] | None) -> Subjects:
        """``subjects`` with noise factors and budgets; unchanged without sensitivity or ``classes``.

        Args:
            classes: sensitivity class of each token of each whole sequence, whose last tokens cross.
        """
        if self.sensitivity is None or classes is None:
            return subjects
        crossing = [row[len(row) - length :] for row, length in zip(classes, subjects.lengths, strict=True)]
        numbers_T = torch.tensor([number for row in crossing for number in row], dtype=torch.long)
        factors_T = self.sensitivity.weights[numbers_T] / (self._scale or 1.0)
        known = [self._known[record].found if record in self._known else set() for record in subjects.records]
        budgets = [self.sensitivity.epsilon({*row, *more}) for row, more in zip(classes, known, strict=True)]
        return replace(subjects, factors_T=factors_T, budgets=tuple(budgets))

    def record_names(self, rows: list[TokenIds]) -> tuple[str, ...]:
        """The name of each whole sequence's record, 16 hex digits."""
        names = (self._prompt_of(row) or self._name(row) for row in rows)
        return tuple(self._owners.get(name, name) for name in names)

    def same_record(self, first: TokenIds, row: TokenIds) -> bool:
        """Whether a whole sequence, which begins with ``first``, goes on with its record: the silo's data has no longer
        prompt that it begins with."""
        return self._prompt_of(first) == self._prompt_of(row)

    def classes(self, rows: list[TokenIds]) -> list[list[int]] | None:
        """The sensitivity class of each token of each whole sequence; None without sensitivity."""
        return None if self.sensitivity is None else [list(self._classes(tuple(row))) for row in rows]

    def detokenizer(self, row: TokenIds) -> Detokenizer:
        """A detokenizer that has read ``row`` and takes further tokens; known classes from the data are applied."""
        assert self.sensitivity is not None
        assert self._decode is not None
        detokenizer = Detokenizer(self.sensitivity, self._decode)
        detokenizer.extend(row)
        detokenizer.raise_to(self._known_classes(row))
        return detokenizer

    def history(self, rows: int) -> SequenceHistory:
        """The history of a new generation of ``rows`` sequences."""
        return SequenceHistory(self, rows)

    def _classes_of(self, row: tuple[int, ...]) -> list[int]:
        known = self._known_classes(list(row))
        return known if len(known) == len(row) else self.detokenizer(list(row)).classes

    def _known_classes(self, row: TokenIds) -> list[int]:
        """Sensitivity classes of the row's first tokens, as far as they match a row of the data."""
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

    def _prompt_of(self, row: TokenIds) -> str | None:
        """The record name of the longest known prompt that the row starts with; None if there is none."""
        found, done = None, 0
        digest = hashlib.blake2b(key=self._key, digest_size=8)
        tokens = array("q", row)
        for length in self._lengths[: bisect_right(self._lengths, len(row))]:
            digest.update(tokens[done:length].tobytes())
            done, name = length, digest.copy().hexdigest()
            found = name if name in self._known else found
        return found

    def _name(self, row: TokenIds) -> str:
        return hashlib.blake2b(array("q", row).tobytes(), key=self._key, digest_size=8).hexdigest()

    def _read_scale(self) -> float | None:
        """The stored noise scale, if it was computed with the same recipe section; None otherwise."""
        if self._folder is None or self.sensitivity is None or not (path := self._folder / "sensitivity.json").exists():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            scale, same = float(kept["scale"]), kept["section"] == self.sensitivity.section.model_dump(mode="json")
            if kept["digest"] != _digest(kept["scale"], kept["section"]) or not 0 < scale < float("inf"):
                raise ValueError(scale)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunError(f"{path} is damaged", remedy="delete it: it is computed again from the data") from error
        return scale if same else None

    def _write_scale(self, scale: float) -> None:
        self._scale = scale
        if self._folder is not None and self.sensitivity is not None:
            path = self._folder / "sensitivity.json"
            section = self.sensitivity.section.model_dump(mode="json")
            with disk_errors(path), writing(path) as temporary:
                kept = {"scale": scale, "section": section, "digest": _digest(scale, section)}
                temporary.write_text(json.dumps(kept))


class SequenceHistory:
    """The sequences of one generation so far. A sequence's record is that of its prompt, whatever tokens follow."""

    def __init__(self, records: Records, rows: int) -> None:
        self._source = records
        self._lengths: list[int] | None = [0] * rows
        """Number of tokens of each row; None after embeddings were given in place of tokens."""
        self._records: tuple[str, ...] = ()
        self._detokenizers: list[Detokenizer] = []
        self._unclaimed: list[TokenIds] | None = None
        """Tokens given to ``read_tokens`` for which ``subjects`` was not called yet."""

    def read_tokens(self, rows: list[TokenIds] | None) -> list[list[int]] | None:
        """Append new tokens.

        Args:
            rows: the new token ids of each row; None for embeddings.

        Returns:
            The sensitivity class of each token of each row, from its first token; None without sensitivity.
        """
        if rows is None or self._lengths is None:
            self._lengths, self._unclaimed, self._detokenizers = None, None, []
            return None
        first = not self._records
        if first:
            self._records = self._source.record_names(rows)
        self._lengths = [old + len(new) for old, new in zip(self._lengths, rows, strict=True)]
        self._unclaimed = rows
        if self._source.sensitivity is None:
            return None
        if first:
            self._detokenizers = [self._source.detokenizer(row) for row in rows]
        else:
            for detokenizer, row in zip(self._detokenizers, rows, strict=True):
                detokenizer.extend(row)
        return [detokenizer.classes for detokenizer in self._detokenizers]

    def subjects(self, rows: list[TokenIds] | None, lengths: list[int]) -> Subjects:
        """The records that the next tensor's sequences belong to. New tokens are appended.

        Args:
            rows: the new token ids of each row, up to the last that crosses; None for embeddings. If ``read_tokens``
                has appended them, they are not appended again.
            lengths: number of new tokens of each row that cross.
        """
        if self._unclaimed is None:
            self.read_tokens(rows)
        appended, self._unclaimed = self._unclaimed, None
        if rows is None or appended is None:
            subjects = self._source.subjects(None, lengths)
            self._records = self._records or subjects.records
            return replace(subjects, records=self._records)
        classes = None
        if self._source.sensitivity is not None:
            extra = [len(all_new) - len(row) for all_new, row in zip(appended, rows, strict=True)]
            pairs = zip(self._detokenizers, extra, strict=True)
            classes = [detokenizer.classes[: len(detokenizer) - count] for detokenizer, count in pairs]
        return self._source.with_sensitivity(Subjects(self._records, tuple(lengths)), classes)

    def crop(self, positions: int) -> None:
        """Drop this many tokens from the end of every row."""
        if self._lengths is not None:
            self._lengths = [length - positions for length in self._lengths]
        for detokenizer in self._detokenizers:
            detokenizer.forget(positions)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self._records = tuple(self._records[row] for row in rows)
        self._detokenizers = [self._detokenizers[row].copy() for row in rows] if self._detokenizers else []
        if self._lengths is not None:
            self._lengths = [self._lengths[row] for row in rows]


def _digest(scale: float, section: object) -> str:
    """SHA-256 of a stored noise scale and the section it was computed with."""
    return hashlib.sha256(json.dumps([scale, section], sort_keys=True).encode()).hexdigest()


def _crossing_classes(rows: Iterable[Tokens], tail: int | None) -> Iterable[int]:
    """Sensitivity classes of the tokens that cross in training: all but a row's last, and only the prompt's tail."""
    for row in rows:
        yield from row.input_classes[len(row.input) - row.crossing(tail) :]
