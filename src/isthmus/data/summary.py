"""What the rows of silos are like: numbers, lengths, answers, duplicates, and examples as the model reads them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from isthmus.data.duplicates import prompt_key
from isthmus.data.row_set import RowSet
from isthmus.data.tokens import Tokens

SetKind = Literal["train", "held out"]
KINDS: tuple[SetKind, SetKind] = ("train", "held out")
MOST_ANSWERS = 20
"""Different answers of free text that are counted one by one; where there are more, none is."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of rows before any is shortened or skipped."""

    least: int
    median: float
    p95: float
    most: int


@dataclass(frozen=True)
class SetSummary:
    """One of a silo's two data sets."""

    rows: int
    """Rows in use: neither bad nor skipped."""
    lengths: Lengths | None
    """None without a row."""
    truncated: int
    skipped: int
    answers: dict[str, int]
    """Rows by answer, the most frequent first; with ``task.choices`` all of them; of free text none if there are many.
    """

    @property
    def truncated_share(self) -> float:
        """Share of the rows in use whose prompt is shortened."""
        return self.truncated / self.rows if self.rows else 0.0

    @property
    def skipped_share(self) -> float:
        """Share of the usable rows that are skipped for their length."""
        return self.skipped / (self.rows + self.skipped) if self.skipped else 0.0


@dataclass(frozen=True)
class ShownExample:
    """A training row as the model reads it, decoded from its tokens."""

    place: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class SiloSummary:
    """One silo's data."""

    name: str
    sets: dict[SetKind, SetSummary]
    examples: list[ShownExample]
    warnings: list[str]
    divided_by: dict[str, int]
    """Rows by the value of ``partition.field``; empty without it."""
    bad_rows: int
    error: str | None
    """What is wrong with the first bad rows; None: no row is bad."""


@dataclass(frozen=True)
class Duplicate:
    """A prompt that stands in places where it should not stand twice."""

    across: str
    """``train and held out`` or ``several silos``."""
    places: list[str]
    """Each as ``silo, kind: file:line``."""


@dataclass(frozen=True)
class DataSummary:
    """The data of all silos that were read."""

    silos: list[SiloSummary]
    duplicates: list[Duplicate]


def summarize_set(rows: RowSet, choices: Sequence[str]) -> SetSummary:
    """The summary of one data set."""
    found = Counter(example.answer for _, example in rows.texts)
    if choices:
        answers = {choice: found[choice] for choice in choices}
    else:
        answers = dict(found.most_common()) if len(found) <= min(MOST_ANSWERS, len(rows.rows) // 2) else {}
    lengths = None
    if rows.lengths:
        middle, p95 = np.percentile(rows.lengths, [50, 95])
        lengths = Lengths(min(rows.lengths), float(middle), float(p95), max(rows.lengths))
    return SetSummary(len(rows.rows), lengths, rows.truncated, rows.skipped, answers)


def set_warnings(kind: SetKind, rows: RowSet) -> list[str]:
    """What a user should look at in one data set."""
    answers, prompts = {example.answer for _, example in rows.texts}, Counter(_prompts(rows))
    found = []
    if not rows.rows and (kind == "train" or rows.lengths):
        found.append(f"{kind}: no row is left")
    if kind == "train" and len(answers) == 1 and len(rows.rows) > 1:
        found.append(f"all {len(rows.rows)} training rows have one answer, {next(iter(answers))!r}")
    if repeated := sum(count - 1 for count in prompts.values()):
        found.append(f"{kind}: {repeated} of {len(rows.rows)} rows repeat the prompt of an earlier one")
    return found


def shown_example(place: str, row: Tokens, tokenizer: PreTrainedTokenizerBase) -> ShownExample:
    """A row as the model reads it, control tokens included."""
    return ShownExample(place, str(tokenizer.decode(row.prompt)), str(tokenizer.decode(row.answer)))


def find_duplicates(sets: Iterable[tuple[str, SetKind, RowSet]]) -> list[Duplicate]:
    """Prompts in training and held-out rows, or in the training rows of several silos (see ``duplicates.prompt_key``).

    Args:
        sets: each with its silo and kind. That several silos evaluate on the same rows is no duplicate.
    """
    places: defaultdict[str, list[tuple[str, SetKind, str]]] = defaultdict(list)
    for silo, kind, rows in sets:
        for prompt, (place, _) in zip(_prompts(rows), rows.texts, strict=True):
            places[prompt].append((silo, kind, place))
    found = []
    for group in places.values():
        trained = {silo for silo, kind, _ in group if kind == "train"}
        named = [f"{silo}, {kind}: {place}" for silo, kind, place in group]
        if trained and any(kind == "held out" for _, kind, _ in group):
            found.append(Duplicate("train and held out", named))
        elif len(trained) > 1:
            found.append(Duplicate("several silos", named))
    return found


def _prompts(rows: RowSet) -> list[str]:
    return [prompt_key(example) for _, example in rows.texts]
