"""One silo's rows as prompts and answers, each with its place."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from isthmus.data.bad_rows import NAMED, BadRows
from isthmus.data.conversations import row_examples
from isthmus.data.duplicates import repeated_prompts, without_duplicates
from isthmus.data.partitions import SiloPart, divided
from isthmus.data.row_count import check_row_count
from isthmus.data.sources import SourceRow, read_rows, rename_columns
from isthmus.data.templates import Placed
from isthmus.recipe import Recipe, SiloSection

log = logging.getLogger(__name__)


def silo_examples(
    section: SiloSection,
    recipe: Recipe,
    bad: BadRows,
    classes: Mapping[str, str] | None = None,
    parts: Mapping[str, SiloPart] | None = None,
) -> tuple[list[Placed], list[Placed]]:
    """A silo's training and held-out examples, in the order of its rows.

    Args:
        section: the silo's table, with its files; without ``train`` it has a part of the recipe's ``[partition]``,
            without both no row.
        bad: gets the errors of rows and files that cannot be used; the other rows are returned.
        classes: sensitivity class by field name (see ``fill_templates``).
        parts: of all silos (see ``divided``); None: they are read.
    """

    def read(sources: Sequence[str]) -> list[SourceRow]:
        return read_rows(sources, format=section.format, columns=section.columns, bad=bad) if sources else []

    def filled(rows: Iterable[SourceRow]) -> list[Placed]:
        examples: list[Placed] = []
        for row in rows:
            with bad.collecting():
                examples += row_examples(row, recipe.task, classes or {})
        return examples

    def renamed(rows: Iterable[SourceRow]) -> list[SourceRow]:
        found = []
        for row in rows:
            with bad.collecting():
                found.append(SourceRow(row.place, rename_columns(row.place, row.fields, section.columns or {})))
        return found

    train, held_out = read(section.train or ()), read(section.held_out or ())
    if not section.train and recipe.partition is not None:
        part = SiloPart([], [])
        with bad.collecting():
            part = (divided(recipe) if parts is None else parts)[section.name]
        train, held_out = renamed(part.train), held_out or renamed(part.held_out)
    kept = filled(held_out)
    return without_duplicates(filled(train), kept, recipe.train.duplicates, bad), kept


def check_examples(recipe: Recipe, names: Collection[str] = ()) -> None:
    """Read all rows of these silos, or of all. What users should know of rows that can be used is logged.

    Raises:
        DataError: a row or file cannot be used, or a silo has too few rows or too many. The first few are named, the
            others counted.
    """
    bad, parts = BadRows(), divided(recipe) if recipe.partition is not None else None
    for section in [recipe.party(name) for name in names] or recipe.silo:
        before = bad.count
        train, held_out = silo_examples(section, recipe, bad, parts=parts)
        for line in _remarks(train, held_out):
            log.warning("%s: %s", section.name, line)
        if bad.count == before:
            with bad.collecting():
                check_row_count(recipe, section.name, len(train))
    bad.raise_any()


def _remarks(train: Sequence[Placed], held_out: Sequence[Placed]) -> Iterator[str]:
    """What makes a silo's scores or its training worth less than they seem."""
    found = repeated_prompts(train, held_out)
    named = "; ".join(f"{train[number][0]} and {place}" for number, place in [*found.items()][:NAMED])
    if found:
        more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
        yield f"{len(found)} of {len(train)} training rows have prompts that are held out: {named}{more}"
    answers = {example.answer for _, example in train}
    if len(answers) == 1 and len(train) > 1:
        yield f"all {len(train)} training rows have one answer"  # the log has no text: 'isthmus data' shows it
