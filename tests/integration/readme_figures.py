"""The figures of a README, each tied to one row of ``benchmarks/results``.

``benchmarks/readme.toml`` says which row each figure comes from; its first lines explain the format. ``faults`` checks
a README against it. Figures are the numbers outside code and link targets. Words such as int8 or fp32, whose digits
follow a letter, are none.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

FIGURE = re.compile(r"(?<!\w)[−-]?\d+(?:,\d{3})*(?:\.\d+)*")
HIDDEN = re.compile(r"```.*?```|^ {4}.*?$|`[^`\n]*`|(?<=\])\([^)\n]*\)|\*\*", flags=re.DOTALL | re.MULTILINE)
SOURCE = re.compile(r"(?P<goal>goal of )?(?:(?P<factor>[\d.]+) × )?(?P<file>[\w-]+): (?P<measure>.+)")

Rows = Mapping[tuple[str, str], Mapping[str, Any]]
"""Measured rows by file and measure."""
Sources = list[str | list[str]]
"""Of a table's row: one cell's source, or sources, after another's."""


def measured(folder: Path) -> Rows:
    """All rows of this folder's JSON files. A measure stands in a file once."""
    rows = {}
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text(encoding="utf-8")):
            place = (path.stem, row["measure"])
            if place in rows:
                raise ValueError(f"{path.name} has two rows named {row['measure']!r}")
            rows[place] = row
    return rows


def visible(readme: str) -> str:
    """The README with spaces in place of code, link targets and bold marks; every other character keeps its place."""
    return HIDDEN.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), readme)


def cells(line: str) -> list[str]:
    """Of a table's line, without outer bars and spaces."""
    return [" ".join(cell.split()) for cell in visible(line).strip().removeprefix("|").removesuffix("|").split("|")]


def faults(readme: str, mapping: Mapping[str, Any], rows: Rows) -> list[str]:
    """All that is wrong with the README's figures, in words; empty if each is right.

    Args:
        mapping: contents of ``benchmarks/readme.toml``.
    """
    check = Check(rows)
    text = visible(readme)
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    check.tables(tables, mapping.get("table", []))
    check.prose(re.sub(r"^\|.*$", "", text, flags=re.MULTILINE), mapping.get("prose", []), mapping.get("settings", []))
    return check.faults


@dataclass
class Check:
    """One pass over a README."""

    rows: Rows
    faults: list[str] = field(default_factory=list)

    def tables(self, tables: list[str], entries: list[Mapping[str, Any]]) -> None:
        known = {tuple(cells(entry["heading"])): entry["rows"] for entry in entries}
        found = Counter(tuple(cells(table.splitlines()[0])) for table in tables)
        self.faults += [f"no table has the heading {' | '.join(one)}" for one in known.keys() - found.keys()]
        self.faults += [
            f"{count} tables have the heading {' | '.join(one)}" for one, count in found.items() if count > 1
        ]
        for table in tables:
            heading, _, *lines = [cells(line) for line in table.splitlines()]
            self._table(heading, lines, known.get(tuple(heading)))

    def _table(
        self, heading: list[str], lines: list[list[str]], rows: Mapping[str, list[str | list[str]]] | None
    ) -> None:
        if rows is None:
            self.faults.append(f"readme.toml has no table with the heading {' | '.join(heading)}")
            return
        sources = {" ".join(visible(label).split()): row for label, row in rows.items()}
        labels = [label for label, *_ in lines]
        for label in sources.keys() ^ set(labels):
            self.faults.append(f"row {label!r} stands in one of README and readme.toml only")
        self.faults += [f"row {label!r} stands twice" for label, count in Counter(labels).items() if count > 1]
        for label, *values in lines:
            self._row(label, values, sources.get(label, []))

    def _row(self, label: str, values: list[str], sources: Sources) -> None:
        if len(values) != len(sources):
            self.faults.append(f"row {label!r} has {len(values)} figures' cells, readme.toml {len(sources)}")
            return
        unmet = False
        for value, source in zip(values, sources, strict=True):
            listed = [source] if isinstance(source, str) and source else list(source)
            unmet |= self.figures(f"row {label!r}", FIGURE.findall(value), listed)
        if unmet != ("missed" in f"{label} {' '.join(values)}"):
            self.faults.append(f"row {label!r} {'misses a goal and does not say' if unmet else 'says'} 'missed'")

    def prose(self, text: str, entries: list[Mapping[str, Any]], settings: list[str]) -> None:
        covered: set[int] = set()
        for setting in settings:
            found = list(re.finditer(rf"(?<![\w.,]){flexible(setting)}(?!\w)(?![.,]\d)", text))
            covered.update(place for one in found for place in range(*one.span()))
            if not found:
                self.faults.append(f"the README does not say {setting!r}")
        for entry in entries:
            pattern = flexible(entry["text"]).replace(r"\{\}", f"({FIGURE.pattern})")
            found = list(re.finditer(pattern, text))
            if len(found) != 1:
                self.faults.append(f"{entry['text']!r} stands in the README {len(found)} times")
                continue
            (one,) = found
            groups = range(1, len(one.groups()) + 1)
            covered.update(place for group in groups for place in range(*one.span(group)))
            unmet = self.figures(repr(entry["text"]), list(one.groups()), entry["figures"])
            if unmet and "missed" not in paragraph(text, one.start()):
                self.faults.append(f"{entry['text']!r} misses a goal, and its paragraph does not say 'missed'")
        for one in FIGURE.finditer(text):
            if not covered.issuperset(range(*one.span())):
                self.faults.append(f"readme.toml does not know {one[0]} in {around(text, one)!r}")

    def figures(self, where: str, figures: list[str], sources: list[str]) -> bool:
        """Compare figures with their sources; whether a goal of theirs is missed."""
        if len(figures) != len(sources):
            self.faults.append(f"{where} has the figures {figures}, readme.toml {sources}")
            return False
        unmet = [self._figure(where, *pair) for pair in zip(figures, sources, strict=True)]
        return any(unmet)

    def _figure(self, where: str, figure: str, source: str) -> bool:
        number = figure.replace(",", "").replace("−", "-")
        if source.startswith("set "):
            if number != source.removeprefix("set "):
                self.faults.append(f"{where}: {figure} should be {source}")
            return False
        parts = SOURCE.fullmatch(source)
        row = self.rows.get((parts["file"], parts["measure"])) if parts else None
        if parts is None or row is None:
            self.faults.append(f"{where}: no measured row {source!r}")
            return False
        value = row["goal"].split()[-1] if parts["goal"] else row["value"]
        right = rounded(Decimal(str(value)) * Decimal(parts["factor"] or 1), len(number.partition(".")[2]))
        if number != right:
            self.faults.append(f"{where}: {figure} should be {right} ({source})")
        return row["met"] is False


def rounded(value: Decimal, decimals: int) -> str:
    """To so many decimals, halves to the even digit; zero without a sign."""
    return str(value.quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_EVEN) + 0)


def flexible(text: str) -> str:
    """A pattern of this text, whatever its line breaks, code left out."""
    return r"\s+".join(map(re.escape, visible(text).split()))


def paragraph(text: str, place: int) -> str:
    start, end = text.rfind("\n\n", 0, place), text.find("\n\n", place)
    return text[max(start, 0) : end if end > 0 else len(text)]


def around(text: str, found: re.Match[str]) -> str:
    return " ".join(text[max(0, found.start() - 30) : found.end() + 30].split())


def slips(readme: str) -> Iterator[tuple[str, str]]:
    """The README with one figure's last digit changed, for every figure and both neighbours; and what was changed."""
    text = visible(readme)
    for found in FIGURE.finditer(text):
        last = found.end() - 1
        for step in (1, 9):
            digit = str((int(readme[last]) + step) % 10)
            yield f"{readme[:last]}{digit}{readme[last + 1 :]}", f"{around(text, found)}: {found[0][:-1]}{digit}"


def swaps(readme: str) -> Iterator[tuple[str, str]]:
    """The README with two cells of a table's line in each other's place; and the line.

    Headings are lines, too. In other lines, cells with equal figures stay where they are.
    """
    lines = readme.splitlines(keepends=True)
    for number, (line, below) in enumerate(pairwise([*lines, ""])):
        parts = line.split("|") if line.startswith("|") else []
        for one, other in combinations(range(2, len(parts) - 1), 2):
            if below.startswith("|--") or FIGURE.findall(parts[one]) != FIGURE.findall(parts[other]):
                swapped = parts.copy()
                swapped[one], swapped[other] = parts[other], parts[one]
                yield "".join([*lines[:number], "|".join(swapped), *lines[number + 1 :]]), line


def read_mapping(path: Path) -> Mapping[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))
