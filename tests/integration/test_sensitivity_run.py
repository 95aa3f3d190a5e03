"""A federation that protects some words more than others, as real processes: it trains, generates, and names a bad
function at its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.storage.journal import read_journal
from tests.integration.processes import Commands, call, rows_of, run_here, write_federation

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]
FUNCTION = "def look(text):\n    return [(0, 2, 'high')]\n"
SECTION: dict[str, Any] = {
    "detectors": ["name", "email", "date"],
    "fields": {"label": "low"},
    "names": "names.txt",
    "function": "mine.py:look",
    "attention": 2.0,
    "classes": {"high": {"noise": 3.0}, "low": {"noise": 0.5}},
}


def federation(folder: Path, function: str = FUNCTION, **sections: Any) -> Path:
    folder.mkdir()
    (folder / "names.txt").write_text("w17\nw23\n")
    (folder / "mine.py").write_text(function)
    sizes = {"rounds": 2, "steps": 6}
    return write_federation(folder, train=sizes, sensitivity=SECTION, boundary={"forward": {"noise": 0.02}}, **sections)


def test_it_trains_and_generates_with_one_key_and_one_scale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = federation(tmp_path / "made"), tmp_path / "run"
    run_here(recipe, run)
    kept = {path: path.read_bytes() for path in run.glob("silos/*/records/*")}
    assert {path.name for path in kept} == {"record-key", "sensitivity.json"}
    assert len(kept) == 4
    measured = [line for line in read_journal(run / "silos/north/metrics.jsonl") if line["event"] == "evaluation"]
    assert measured[-1]["loss"] < measured[0]["loss"]
    call(capsys, monkeypatch, "generate", run, rows_of("north")[0]["text"], "--max-new-tokens", 3).succeeded()
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_function_that_raises_on_the_data_is_named_at_the_start(commands: Commands, tmp_path: Path) -> None:
    alone = [{"name": "north", "train": "north.jsonl", "held_out": "north.jsonl"}]
    recipe = federation(tmp_path / "made", "def look(text):\n    return text.no_such_thing\n", silo=alone)
    commands.run("run", recipe, "--run-dir", tmp_path / "run").failed("mine.py:look", "correct the function")
