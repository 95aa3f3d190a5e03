"""What silos' rows are like, as a table with examples and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console

from isthmus.data.summary import DataSummary, SetSummary, ShownExample, SiloSummary
from isthmus.report.formatting import NarrowTable

SHOWN_VALUES = 20
"""Values of a histogram that are named."""
SHOWN_DUPLICATES = 5
"""Duplicates that are named; the others are counted."""


def data_json(summary: DataSummary) -> str:
    """The summary as a JSON object."""
    return json.dumps(asdict(summary), indent=2, allow_nan=False)


def show_data(summary: DataSummary, console: Console) -> None:
    """Print the table, then answers, warnings, bad rows and duplicates, then each silo's examples."""
    console.print(_table(summary))
    for silo in summary.silos:
        for kind, one in silo.sets.items():
            if one.answers:
                _print(console, f"answers: {silo.name}, {kind}: {_counts(one.answers)}")
        if silo.divided_by:
            _print(console, f"divided by field: {silo.name}: {_counts(silo.divided_by)}")
        for warning in silo.warnings:
            _print(console, f"warning: {silo.name}: {warning}")
        if silo.error is not None:
            _print(console, f"error: {silo.name}: {silo.error}")
    _show_duplicates(summary, console)
    for silo in summary.silos:
        for example in silo.examples:
            _show_example(silo.name, example, console)


def _table(summary: DataSummary) -> NarrowTable:
    table = NarrowTable("rows, and tokens of a row")
    table.names("silo")
    table.labels("set")
    table.numbers("rows", "bad", "skipped", "cut", "min", "median", "95 %", "max")
    for silo in summary.silos:
        for number, (kind, one) in enumerate(silo.sets.items()):
            if number and one.lengths is None:  # a silo without held-out rows
                continue
            table.cells(silo.name, kind, f"{one.rows:,}", _bad(silo) if not number else "", *_cells(one))
        table.add_section()
    return table


def _bad(silo: SiloSummary) -> str:
    return f"{silo.bad_rows:,}" if silo.bad_rows else ""


def _cells(one: SetSummary) -> tuple[str, ...]:
    long = (f"{one.skipped_share:.1%}" if one.skipped else "", f"{one.truncated_share:.1%}" if one.truncated else "")
    if one.lengths is None:
        return (*long, "", "", "", "")
    lengths = one.lengths
    return (*long, f"{lengths.least}", f"{lengths.median:.0f}", f"{lengths.p95:.0f}", f"{lengths.most}")


def _counts(found: dict[str, int]) -> str:
    named = [f"{visible(repr(value))} {count:,}" for value, count in list(found.items())[:SHOWN_VALUES]]
    return ", ".join(named) + (f" and {len(found) - SHOWN_VALUES} more" if len(found) > SHOWN_VALUES else "")


def _show_duplicates(summary: DataSummary, console: Console) -> None:
    for across in ("train and held out", "several silos"):
        found = [one for one in summary.duplicates if one.across == across]
        for one in found[:SHOWN_DUPLICATES]:
            more = f" and {len(one.places) - 4} more" if len(one.places) > 4 else ""
            _print(console, f"warning: one prompt in {across}: {'; '.join(one.places[:4])}{more}")
        if len(found) > SHOWN_DUPLICATES:
            _print(console, f"warning: {len(found)} prompts in all stand in {across}")


def _show_example(silo: str, example: ShownExample, console: Console) -> None:
    _print(console, f"\n{silo}, {visible(example.place)}: prompt, then answer, as the model reads them")
    _print(console, f"| {visible(example.prompt)}")
    _print(console, f"> {visible(example.answer)}")


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def visible(text: str) -> str:
    """A text on one line: line ends, and characters that a terminal would obey or not show, as their escapes."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
