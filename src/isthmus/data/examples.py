"""One silo's rows as prompts and answers, each with its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from isthmus.data.bad_rows import BadRows
from isthmus.data.sources import read_rows
from isthmus.data.templates import Example, fill_templates
from isthmus.recipe import SiloSection, TaskSection

Placed = tuple[str, Example]
"""A row's place, as ``file:line``, and its text."""


def silo_examples(
    section: SiloSection,
    sources: Sequence[str],
    task: TaskSection,
    bad: BadRows,
    classes: Mapping[str, str] | None = None,
) -> list[Placed]:
    """The examples of some of a silo's sources, in their order.

    Args:
        section: the silo's table, with format and columns of its files.
        sources: ``section.train`` or ``section.held_out``.
        bad: gets the errors of rows and files that cannot be used; the other rows are returned.
        classes: sensitivity class by field name (see ``fill_templates``).
    """
    examples: list[Placed] = []
    for row in read_rows(sources, format=section.format, columns=section.columns, bad=bad):
        with bad.collecting():
            examples.append((row.place, fill_templates(row, task, classes or {})))
    return examples


def check_examples(silos: Sequence[SiloSection], task: TaskSection) -> None:
    """Read all rows of these silos.

    Raises:
        DataError: a row or file cannot be used. The first few are named, the others counted.
    """
    bad = BadRows()
    for section in silos:
        for sources in (section.train, section.held_out or ()):
            if sources:
                silo_examples(section, sources, task, bad)
    bad.raise_any()
