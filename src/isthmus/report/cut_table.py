"""The measured cuts and the one that was chosen, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console

from isthmus.engines.cuts import (
    AVERAGING_SHARE,
    ROUND_TRIPS,
    Averaging,
    CutChoice,
    CutFigures,
    step_seconds,
    token_seconds,
)
from isthmus.report.formatting import NarrowTable

ABSENT_FIGURE = "–"


def cut_json(choice: CutChoice) -> str:
    """The choice as a JSON object: each cut's figures with ``step`` and ``token`` in seconds, link in them."""
    values = asdict(choice)
    for one, figures in zip(values["figures"], choice.figures, strict=True):
        measured = figures.silo_step is not None
        one["step"] = step_seconds(figures, choice.link) if measured else None
        one["token"] = token_seconds(figures, choice.link) if measured else None
    return json.dumps(values, indent=2, allow_nan=False)


def show_cuts(choice: CutChoice, console: Console) -> None:
    """Print the table, what it rests on, and the choice with its reason in the last line."""
    table = NarrowTable(f"cuts of {choice.silo}")
    table.labels("cut")
    table.numbers("memory\nMB", "silo\ns/step", "trunk\ns/step", "all\ns/step", "up\nMB", "down\nMB", "token\nms")
    table.numbers("leaks\n%")
    table.names("fits")
    for one in choice.figures:
        table.cells(*_cut_cells(one, choice))
    console.print(table)
    for line in _notes(choice):
        console.print(line, markup=False, highlight=False, soft_wrap=True, style="dim")
    line = f"choice: bottom = {choice.bottom}, top = {choice.top}: {choice.why}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cut_cells(one: CutFigures, choice: CutChoice) -> tuple[str, ...]:
    limits, measured = choice.limits, one.silo_step is not None
    small = one.memory is not None and one.memory <= limits.memory
    private = limits.leakage is None or (one.leakage is not None and one.leakage <= limits.leakage)
    return (
        f"{one.bottom},{one.top}",
        _figure(one.memory, 1e-6, ".0f"),
        _figure(one.silo_step),
        _figure(one.trunk_step),
        _figure(step_seconds(one, choice.link) if measured else None),
        _figure(one.up if measured else None, 1e-6),
        _figure(one.down if measured else None, 1e-6),
        _figure(token_seconds(one, choice.link) if measured else None, 1e3, ".0f"),
        _figure(one.leakage, 100, ".1f"),
        "yes" if small and private else "no: leakage" if small else "no: memory",
    )


def _figure(value: float | None, scale: float = 1.0, form: str = ".3g") -> str:
    return ABSENT_FIGURE if value is None else f"{scale * value:{form}}"


def _notes(choice: CutChoice) -> list[str]:
    link, limits, first = choice.link, choice.limits, choice.figures[0]
    times = [] if link.rtt is None else [f"round trip {1e3 * link.rtt:.3g} ms, {ROUND_TRIPS} a step"]
    speed = [] if link.bandwidth is None else [f"{link.bandwidth / 1e6:.3g} MB/s"]
    notes = [f"link: {', '.join([link.source, *times, *speed])}"]
    allowed = "any leakage" if limits.leakage is None else f"leakage of {limits.leakage:.0%}"
    notes.append(f"allowed: {limits.memory / 1e6:,.0f} MB, {allowed}")
    attacked = next((one for one in choice.figures if one.attack is not None), first)
    if attacked.attack is not None:
        notes += [
            f"leaks: tokens recovered of {attacked.attacked_rows} rows, by one who knows {attacked.known_rows} others",
            "and what crossed of them; a stronger attack may read more",
        ]
    if any(one.trunk_step is None and one.silo_step is not None for one in choice.figures):
        notes.append("the trunk's part was not measured here: the times of a step and a token leave it out")
    if choice.averaging is not None and link.rtt is not None:
        notes += _averaging_notes(choice, choice.averaging)
    return notes


def _averaging_notes(choice: CutChoice, averaging: Averaging) -> list[str]:
    size = f"{choice.chosen.update_bytes / 1e6:.3g} MB of update and mean"
    if choice.link.bandwidth is None:
        size = f"{size} (their time needs --bandwidth)"
    notes = [f"averaging: {size}, {averaging.share:.0%} of the steps' time"]
    if averaging.share > AVERAGING_SHARE:
        seldom = f"with train.steps = {averaging.interval} it is {AVERAGING_SHARE:.0%} at most"
        notes.append(f"{seldom}; averaging more often learns better")
    return notes
