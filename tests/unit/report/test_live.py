"""The live table: a row a silo, word of those that are lost, and at the end what it cost in privacy."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isthmus.errors import BudgetExhausted, RunError
from isthmus.report import live
from isthmus.report.live import run_with_progress
from isthmus.storage.record import RunDirectory
from tests.conftest import make_recipe

STEP = {"event": "step", "step": 2, "loss": 1.5, "tokens": 8, "seconds": 0.5, "sent_bytes": 3_000_000}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(
        tmp_path, make_recipe(Path("none"), silos=("north", "south"), train={"rounds": 2, "steps": 4})
    )
    for name, gain in (("north", 0.5), ("south", 0.25)):
        journal = made.role(name).journal("metrics")
        for round, loss in ((0, 2.0), (1, 2.0 - gain)):
            crossed = {"own_sent_bytes": 250_000, "own_received_bytes": 250_000}
            journal.append({"event": "evaluation", "round": round, "loss": loss, "seconds": 0.25, **crossed})
        journal.append({**STEP, "round": 2, "received_bytes": 1_000_000, "epsilon": 7.0, "skipped": 3})
    return made


def shown(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, federation: Any, width: int = 180) -> str:
    console = Console(file=io.StringIO(), width=width)
    monkeypatch.setattr(live, "run_federation", federation)
    try:
        run_with_progress(run, console)
    finally:
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_each_silo_has_a_row_and_the_worst_is_named(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.report.privacy_table.read_statements", lambda run: [])
    monkeypatch.setattr("isthmus.report.privacy_table.show", lambda told, console: console.print("spent"))

    def federation(run: RunDirectory, watch: Any, tell: Any) -> None:
        watch()
        tell("silo west fell [1 of 3]")

    text = shown(run, monkeypatch, federation)
    (north,) = (line for line in text.splitlines() if line.strip().startswith("north "))
    for cell in ("6/8", "1.500", "16", "3.0 MB", "1.0 MB", " 7 ", "2.000  1.500", "+0.500"):
        assert cell in north, cell
    assert "held-out: after round 0, 1" in text
    assert "north: 3 rows left out of steps, their budgets are spent" in text
    assert "of which evaluations: 50 % of the silos' time, 2.0 MB of the 8.0 MB up and down" in text
    assert "after round 1: worst south with 1.750, mean 1.625" in text
    assert "silo west fell [1 of 3]" in text.splitlines()
    assert text.endswith("spent\n")


@pytest.fixture
def _no_privacy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.report.privacy_table.read_statements", lambda run: [])
    monkeypatch.setattr("isthmus.report.privacy_table.show", lambda told, console: None)


@pytest.mark.usefixtures("_no_privacy")
def test_the_widest_table_fits_a_terminal(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = run.role("north").journal("metrics")
    for round in range(2, 9):
        journal.append({"event": "evaluation", "round": round, "loss": 11.5, "seconds": 0.25})
    journal.append({**STEP, "round": 2, "sent_bytes": 98_765_400_000, "received_bytes": 1, "epsilon": 123_456.0})
    lines = shown(run, monkeypatch, lambda *_: None, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)


@pytest.mark.usefixtures("_no_privacy")
def test_output_that_is_no_terminal_gets_lines_of_progress(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LINE_SECONDS", 0.0)

    def federation(run: RunDirectory, watch: Any, tell: Any) -> None:
        watch()
        watch()  # nothing new
        run.role("south").journal("metrics").append({**STEP, "step": 3, "round": 2, "received_bytes": 0, "loss": 2.0})
        watch()

    lines = [line for line in shown(run, monkeypatch, federation).splitlines() if line.startswith("step ")]
    assert lines == [
        "step 6/8 (north is last), loss 1.500 to 1.500, 6.0 MB up",
        "step 6/8 (north is last), loss 1.500 to 2.000, 6.0 MB up",
    ]


@pytest.mark.usefixtures("_no_privacy")
def test_a_run_that_learned_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that learned little, and not one that only serves."""
    recipe = make_recipe(Path("none"), silos=("north", "south"), train={"rounds": 1, "steps": 2})
    spent = RunDirectory.create(tmp_path / "spent", recipe)
    for name in ("north", "south"):
        journal = spent.role(name).journal("metrics")
        journal.append({**STEP, "round": 1, "loss": None, "tokens": 0, "received_bytes": 0, "epsilon": 0.0})
    with pytest.raises(BudgetExhausted, match="nothing was learned") as caught:
        shown(spent, monkeypatch, lambda *_: None)
    assert "privacy.record_epsilon" in caught.value.remedy
    spent.role("south").journal("metrics").append({**STEP, "round": 1, "received_bytes": 0, "epsilon": 0.1})
    shown(spent, monkeypatch, lambda *_: None)
    idle = recipe.model_copy(update={"train": recipe.train.model_copy(update={"rounds": 0})})
    shown(RunDirectory.create(tmp_path / "idle", idle), monkeypatch, lambda *_: None)


def test_a_failure_is_passed_on_and_ends_the_line(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def federation(run: RunDirectory, watch: Any, tell: Any) -> None:
        raise RunError("no", remedy="none")

    with pytest.raises(RunError, match="no"):
        shown(run, monkeypatch, federation)


def test_the_first_score_and_the_last_ones_are_shown() -> None:
    assert live._shown_rounds({3, 0, 1}) == [0, 1, 3]
    assert live._shown_rounds(set(range(40))) == [0, 37, 38, 39]
