"""The table of cuts fits 80 columns, and ends with the choice; as JSON it has everything."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from isthmus.engines.cuts import CutChoice, CutFigures, CutLimits, Link, averaging, choose_cut
from isthmus.report.cut_table import cut_json, show_cuts

LARGE = CutFigures(
    10,
    10,
    123_456_000_000,
    123.4,
    234.5,
    999_900_000,
    999_900_000,
    12.0,
    23.0,
    4000,
    999_900_000,
    0.99,
    (0.9, 1.0),
    "linear",
    24,
    9,
)
SMALL = CutFigures(
    1, 1, 500_000_000, 0.25, 0.5, 1_300_000, 1_200_000, 0.01, 0.03, 4000, 800_000, 0.5, (0.4, 0.6), "linear", 24, 9
)


def choice(*figures: CutFigures, leakage: float | None = None) -> CutChoice:
    return choose_cut("north", figures, Link(0.01, 1e7, "as given"), CutLimits(10**9, leakage))


def shown(one: CutChoice) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    show_cuts(one, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.rstrip("\n").split("\n")


def test_the_widest_table_fits_a_terminal_without_a_cut_cell() -> None:
    lines = shown(choice(LARGE, SMALL, CutFigures(20, 9)))
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)


def test_each_cut_has_a_row_and_the_choice_is_the_last_line() -> None:
    lines = shown(choice(LARGE, SMALL, CutFigures(20, 9)))
    row = next(line.split() for line in lines if line.strip().startswith("1,1"))
    assert row == ["1,1", "500", "0.25", "0.5", "1.03", "1.3", "1.2", "50", "50.0", "yes"]
    assert next(line for line in lines if line.strip().startswith("20,9")).split()[1:3] == ["–", "–"]
    assert lines[-1].startswith("choice: bottom = 1, top = 1: 1 of 3 cuts fit; its step is the fastest")


def test_why_a_cut_does_not_fit() -> None:
    lines = shown(choice(LARGE, replace(SMALL, bottom=2, leakage=0.9), SMALL, leakage=0.6))
    assert next(line for line in lines if "10,10" in line).rstrip().endswith("no: memory")
    assert next(line for line in lines if line.strip().startswith("2,1")).rstrip().endswith("no: leakage")


def test_what_was_not_measured_is_said() -> None:
    lines = "\n".join(shown(choice(replace(SMALL, trunk_step=None, trunk_token=None, leakage=None, attack=None))))
    assert "the trunk's part was not measured here" in lines
    assert "leaks: tokens" not in lines


def test_json_has_every_figure_with_its_sums() -> None:
    found = json.loads(cut_json(choice(SMALL, CutFigures(20, 9))))
    assert (found["bottom"], found["top"], found["silo"]) == (1, 1, "north")
    first, killed = found["figures"]
    assert first["leakage_interval"] == [0.4, 0.6]
    assert first["step"] == pytest.approx(0.25 + 0.5 + 0.03 + 0.25)
    assert (killed["memory"], killed["step"], killed["token"]) == (None, None, None)


def test_how_often_to_average_is_said_where_the_link_is_slow() -> None:
    one = choice(SMALL)
    assert "averaging" not in "\n".join(shown(one))
    slow = replace(one, averaging=averaging(SMALL, replace(one.link, bandwidth=1e6), 1))
    text = " ".join(shown(slow))
    assert "0.8 MB of update and mean" in text
    assert f"with train.steps = {slow.averaging.interval if slow.averaging else 0} it is 10% at most" in text
    often = replace(one, averaging=averaging(SMALL, replace(one.link, bandwidth=1e9), 1))
    assert "train.steps" not in " ".join(shown(often))
    assert json.loads(cut_json(slow))["averaging"]["interval"] > 1
