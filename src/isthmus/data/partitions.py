"""One set of rows divided among silos, for simulations on one machine."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isthmus.data.bad_rows import BadRows
from isthmus.data.sources import SourceRow, read_rows
from isthmus.errors import DataError
from isthmus.recipe import PartitionSection, Recipe

Indices = np.ndarray[Any, np.dtype[np.int64]]
"""Numbers of rows."""
DRAWS = 1000
"""Draws of shares, before it is given up to leave no silo without a row."""


@dataclass(frozen=True)
class SiloPart:
    """One silo's rows of the set, in the set's order."""

    train: list[SourceRow]
    held_out: list[SourceRow]


def divided(recipe: Recipe) -> dict[str, SiloPart]:
    """The rows of the recipe's ``[partition]`` by silo: each row in exactly one part, the same ones for the same seed.

    Raises:
        DataError: a row or file cannot be used, a row has no value to divide by, or a silo would have no row.
    """
    section = recipe.partition
    assert section is not None
    rows = read_rows(section.data, format=section.format)
    silos = [silo.name for silo in recipe.silo if not silo.train]
    seed = recipe.seed if section.seed is None else section.seed
    random = np.random.default_rng(list(hashlib.sha256(f"{seed}/partition".encode()).digest()))
    values = [] if section.field is None else _values(rows, section.field)
    parts = divide(section, len(rows), values, silos, random)
    return {
        silo: _part([rows[index] for index in np.sort(indices)], section.held_out, random)
        for silo, indices in zip(silos, parts, strict=True)
    }


def divide(
    section: PartitionSection, count: int, values: Sequence[str], silos: Sequence[str], random: np.random.Generator
) -> list[Indices]:
    """The numbers from 0 to ``count`` in one part for each silo.

    Args:
        values: each row's value of ``section.field``; unused without it.

    Raises:
        DataError: a silo would have no row.
    """
    if count < len(silos):
        raise DataError(f"{count} rows for {len(silos)} silos", remedy="add rows to partition.data, or take silos away")
    if section.by == "iid":
        return np.array_split(random.permutation(count), len(silos))
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, value in enumerate(values or [""] * count):
        groups[value].append(index)
    if section.by == "field":
        return _whole_groups(groups, silos)
    for _ in range(DRAWS):
        parts = _by_shares([groups[value] for value in sorted(groups)], len(silos), section.alpha, random)
        if all(len(part) for part in parts):
            return parts
    raise DataError(
        f"with partition.alpha = {section.alpha:g} a silo has no row in each of {DRAWS} draws",
        remedy="raise partition.alpha, or take silos away",
    )


def _by_shares(groups: Iterable[Sequence[int]], silos: int, alpha: float, random: np.random.Generator) -> list[Indices]:
    """The rows of each group at random in shares that are drawn for it."""
    parts: list[list[Indices]] = [[] for _ in range(silos)]
    for group in groups:
        shares = random.dirichlet(np.full(silos, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(group)).astype(int)
        for part, piece in zip(parts, np.split(random.permutation(group), cuts), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def _whole_groups(groups: dict[str, list[int]], silos: Sequence[str]) -> list[Indices]:
    """Each group to one silo: by its name, or else to the one with fewest rows, large groups first."""
    parts: dict[str, list[int]] = {silo: [] for silo in silos}
    by_name = set(groups) <= set(silos)
    for value in sorted(groups, key=lambda value: (-len(groups[value]), value)):
        parts[value if by_name else min(silos, key=lambda silo: len(parts[silo]))] += groups[value]
    empty = [silo for silo in silos if not parts[silo]]
    if empty:
        raise DataError(
            f"partition.field has {len(groups)} values for {len(silos)} silos; {empty[0]} has no row",
            remedy="take silos away, or divide by another field",
        )
    return [np.array(part, dtype=np.int64) for part in parts.values()]


def _values(rows: Sequence[SourceRow], field: str) -> list[str]:
    """Each row's value of a field, as text."""
    bad, found = BadRows(), []
    for row in rows:
        value = row.fields.get(field)
        with bad.collecting():
            if not isinstance(value, str | int | float) or (isinstance(value, float) and math.isnan(value)):
                raise DataError(
                    f"{row.place} has no value to divide by in {field!r}",
                    remedy=f"correct partition.field; the row has {', '.join(map(repr, row.fields))}",
                )
            found.append(str(value))
    bad.raise_any()
    return found


def _part(rows: list[SourceRow], share: float, random: np.random.Generator) -> SiloPart:
    """A silo's rows, of which a share is held out at random: of two rows or more one at least, and never all."""
    if not share or len(rows) < 2:
        return SiloPart(rows, [])
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    chosen = set(random.permutation(len(rows))[:count].tolist())
    return SiloPart(
        [row for index, row in enumerate(rows) if index not in chosen],
        [row for index, row in enumerate(rows) if index in chosen],
    )
