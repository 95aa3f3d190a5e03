"""The rows of one of a silo's data sets, in tokens, and what became of those that are longer than rows may be."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from isthmus.data.bad_rows import BadRows
from isthmus.data.templates import Placed
from isthmus.data.tokens import Tokens, tokenize
from isthmus.errors import DataError
from isthmus.privacy.sensitivity import Sensitivity
from isthmus.recipe import Recipe


@dataclass(frozen=True)
class RowSet:
    """Rows in tokens, in the order of their files, without those that were skipped."""

    rows: list[Tokens]
    texts: list[Placed]
    """Place and text of each of ``rows``."""
    lengths: list[int]
    """Tokens of every row before any was shortened or skipped: prompt, answer and filler."""
    truncated: int = 0
    """Rows whose prompt was shortened."""
    skipped: int = 0
    """Rows that were left out for their length."""

    @property
    def note(self) -> str:
        """What became of rows that are too long, in words; empty if none is."""
        done = f"{self.truncated} lose a part of their prompt" if self.truncated else f"{self.skipped} are skipped"
        return f"of {len(self.lengths)} rows {done}" if self.truncated or self.skipped else ""

    def check_vocabulary(self, size: int) -> None:
        """Refuse token ids that the model does not have: its tokenizer is another's, or was extended.

        Args:
            size: number of tokens that the model has.

        Raises:
            DataError: a row has one. The first such row is named.
        """
        for row, (place, _) in zip(self.rows, self.texts, strict=True):
            largest = max((*row.prompt, *row.answer))
            if largest >= size:
                raise DataError(
                    f"{place} has the token {largest}, but the model has {size} tokens",
                    remedy="use the tokenizer that belongs to the model, without added tokens",
                )


def as_tokens(
    texts: Sequence[Placed],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows,
    pad: int,
    sensitivity: Sensitivity | None = None,
) -> RowSet:
    """Rows in tokens; those longer than ``train.max_tokens`` as ``train.long_rows`` says.

    Args:
        bad: gets the errors of rows without a token or a place for a prompt, and of rows that the recipe refuses.
        pad: token id of the filler after short choices.
        sensitivity: classifies each token.
    """
    most, policy = recipe.train.max_tokens, recipe.train.long_rows

    def read(chosen: Sequence[Placed], longest: int) -> list[Tokens]:
        return tokenize(
            [example for _, example in chosen],
            tokenizer,
            longest,
            free_text=not recipe.task.choices,
            choices=recipe.task.continuations,
            pad=pad,
            sensitivity=sensitivity,
            truncate=recipe.task.truncate,
        )

    read_rows = zip(_read_each(texts, partial(read, longest=sys.maxsize), bad), texts, strict=True)
    whole = [(row, text) for row, text in read_rows if row is not None]
    long = [(row, text) for row, text in whole if _length(row) > most]
    cut: list[Tokens | None] = [None] * len(long)
    if policy == "refuse":
        _refuse(long, most, bad)
    if policy == "truncate":
        cut = _read_each([text for _, text in long], partial(read, longest=most), bad)
    shortened = iter(cut)
    rows = [(row if _length(row) <= most else next(shortened), text) for row, text in whole]
    kept = [(row, text) for row, text in rows if row is not None]
    return RowSet(
        [row for row, _ in kept],
        [text for _, text in kept],
        [_length(row) for row, _ in whole],
        truncated=sum(row is not None for row in cut),
        skipped=len(long) if policy == "skip" else 0,
    )


def _length(row: Tokens) -> int:
    return len(row.prompt) + len(row.answer) + len(row.filler)


def _read_each(
    texts: Sequence[Placed], read: Callable[[Sequence[Placed]], list[Tokens]], bad: BadRows
) -> list[Tokens | None]:
    """Each text in tokens, None in place of a bad one: all at once, and if that fails one by one, to find the bad."""
    with suppress(DataError):
        return list(read(texts))
    found: list[Tokens | None] = []
    for text in texts:
        found.append(None)
        with bad.collecting():
            try:
                (found[-1],) = read([text])
            except DataError as error:
                raise DataError(f"{text[0]}: {error.message}", remedy=error.remedy) from error
    return found


def _refuse(long: Sequence[tuple[Tokens, Placed]], most: int, bad: BadRows) -> None:
    for row, (place, _) in long:
        with bad.collecting():
            raise DataError(
                f"{place} has {_length(row)} tokens, more than train.max_tokens = {most}",
                remedy='raise train.max_tokens, shorten the row, or set train.long_rows = "skip" or "truncate"',
            )
