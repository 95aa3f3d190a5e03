"""One silo's rows as prompts and answers, each with its place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from isthmus.data.bad_rows import BadRows
from isthmus.data.conversations import row_examples
from isthmus.data.partitions import SiloPart, divided
from isthmus.data.row_count import check_row_count
from isthmus.data.sources import SourceRow, read_rows, rename_columns
from isthmus.data.templates import Example
from isthmus.recipe import Recipe, SiloSection

Placed = tuple[str, Example]
"""A row's place, as ``file:line``, and its text."""


def silo_examples(
    section: SiloSection,
    recipe: Recipe,
    bad: BadRows,
    classes: Mapping[str, str] | None = None,
    parts: Mapping[str, SiloPart] | None = None,
) -> tuple[list[Placed], list[Placed]]:
    """A silo's training and held-out examples, in the order of its rows.

    Args:
        section: the silo's table, with its files; without ``train`` it has a part of the recipe's ``[partition]``.
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
    if not section.train:
        part = SiloPart([], [])
        with bad.collecting():
            part = (divided(recipe) if parts is None else parts)[section.name]
        train, held_out = renamed(part.train), held_out or renamed(part.held_out)
    return filled(train), filled(held_out)


def check_examples(recipe: Recipe, names: Collection[str] = ()) -> None:
    """Read all rows of these silos, or of all.

    Raises:
        DataError: a row or file cannot be used, or a silo has too few rows or too many. The first few are named, the
            others counted.
    """
    bad, parts = BadRows(), divided(recipe) if recipe.partition is not None else None
    for section in [recipe.party(name) for name in names] or recipe.silo:
        before = bad.count
        train, _ = silo_examples(section, recipe, bad, parts=parts)
        if bad.count == before:
            with bad.collecting():
                check_row_count(recipe, section.name, len(train))
    bad.raise_any()
