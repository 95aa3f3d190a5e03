"""A federation that waits for nobody by ``isthmus run``: a silo stands still, the trunk is killed, the run goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from tests.integration.processes import (
    Commands,
    assert_no_traceback,
    call,
    processes_of,
    steps_of,
    train_here,
    until,
    write_federation,
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
ROUNDS = 40


def test_the_fast_silo_goes_on_and_the_run_may_be_cut_off(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_federation(
        tmp_path / "federation",
        federation={"asynchronous": {"buffer": 1, "staleness": ROUNDS}},
        train={"rounds": ROUNDS, "steps": 10, "evaluate": False},
    )
    run = tmp_path / "run"
    directory, root = RunDirectory(run), RunDirectory(run).role("root")
    cut_off = commands.start("run", recipe, "--run-dir", run)
    until(lambda: steps_of(run, "south") and steps_of(run, "north"), "both silos' first steps", command=cut_off)
    south = cut_off.role("south")
    south.suspend()
    begun = root.last_round()
    until(lambda: root.last_round() >= begun + 5, "versions without south", command=cut_off)
    south.resume()
    until(lambda: any("south" in line["weights"] for line in _lines(run)[begun + 5 :]), "south", command=cut_off)
    slow = next(line for line in _lines(run)[begun + 5 :] if "south" in line["weights"])
    assert slow["staleness"]["south"] >= 4
    assert directory.completed() >= begun + 5
    cut_off.role("trunk").send_signal(signal.SIGKILL)
    cut_off.wait().failed("the trunk was killed by SIGKILL", "isthmus run --resume")
    assert root.last_round() < ROUNDS
    assert not processes_of(run)

    train_here(directory)
    assert [line["round"] for line in _lines(run)] == list(range(1, ROUNDS + 1))
    assert directory.completed() == ROUNDS
    call(capsys, monkeypatch, "export", run, tmp_path / "adapter").succeeded()
    assert_no_traceback(run)


def _lines(run: Path) -> list[dict[str, dict[str, int]]]:
    return read_journal(run / "root/metrics.jsonl")
