"""A cut that moves while trunk, root and silos are processes of their own, each with a folder that no other sees."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.engines.local import create_run
from isthmus.engines.repartition import move_if_due
from isthmus.recipe import Recipe
from isthmus.storage.journal import read_journal
from tests.integration.processes import (
    Command,
    Commands,
    Ended,
    call,
    free_port,
    states,
    train_here,
    until,
    write_federation,
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
ROUNDS = 6
MOVES = [{"after": 2, "bottom": 2}, {"after": 4, "bottom": 1, "top": 2}]
"""Block 1 to the silos; then back to the trunk, and block 3 to the silos."""
TRAIN = {"rounds": ROUNDS, "steps": 2, "evaluate": True, "learning_rate": 0.05}


class Federation:
    """Parties with a folder each, started by the command, and the same recipe as one run on this machine."""

    def __init__(self, folder: Path, commands: Commands, *, together: bool, **sections: Any) -> None:
        self._folder, self._commands, self._together = folder, commands, together
        trunk = {"address": f"localhost:{free_port()}", "together": 1}
        root = trunk["address"] if together else f"localhost:{free_port()}"
        train, leads = TRAIN | sections.pop("train", {}), {"address": root} | sections.pop("root", {})
        made = {"train": train, "trunk": trunk, "root": leads, "model": {"moves": MOVES}, **sections}
        self.recipe = write_federation(folder / "made", **made)
        self.started: dict[str, Command] = {}

    def start(self, name: str) -> Command:
        """Start a party, once more too."""
        command: tuple[object, ...] = ("silo", self.recipe, name)
        if name in ("trunk", "root"):
            command = (name, self.recipe, *(["--with-root"] if self._together else []))
        self.started[name] = self._commands.start(*command, "--run-dir", self.run_of(name))
        return self.started[name]

    def run_of(self, name: str) -> Path:
        return self._folder / f"machine-{name}" / "run"

    def gathered(self) -> Path:
        """What each party has at the end, in one folder."""
        whole = self._folder / "whole"
        for name in self.started:
            shutil.copytree(self.run_of(name), whole, dirs_exist_ok=True)
        return whole

    def on_one_machine(self) -> Path:
        """The run directory of ``isthmus run`` with this recipe."""
        run = create_run(Recipe.read(self.recipe), self._folder / "local")
        train_here(run)
        while move_if_due(run):
            train_here(run)
        assert run.completed() == ROUNDS
        return run.path


@pytest.fixture
def isthmus(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    return lambda *arguments: call(capsys, monkeypatch, *arguments)


def assert_alike(one: Path, other: Path) -> None:
    """The same adapters, moments and losses."""
    ours, theirs = states(one, ROUNDS), states(other, ROUNDS)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=1e-6, msg=key)
    for silo in ("north", "south"):
        found, expected = (read_journal(run / "silos" / silo / "metrics.jsonl") for run in (one, other))
        losses, wanted = ([line["loss"] for line in lines if line["event"] == "step"] for lines in (found, expected))
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted), rtol=0, atol=1e-6)
        measured = [[line["round"] for line in lines if line["event"] == "evaluation"] for lines in (found, expected)]
        assert measured[0] == measured[1]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("lora", ["plain", "frozen-a"])
def test_parties_on_machines_of_their_own_follow_the_cut(
    commands: Commands, isthmus: Callable[..., Ended], tmp_path: Path, together: bool, lora: str
) -> None:
    federation = Federation(tmp_path, commands, together=together, federation={"lora": lora})
    isthmus("certificates", federation.recipe).succeeded()
    servers = ("trunk",) if together else ("trunk", "root")
    for name in (*servers, "north", "south"):
        federation.start(name)
    for name in ("north", "south"):
        federation.started[name].wait().succeeded()
        assert f"finished after {ROUNDS} rounds" in federation.started[name].stdout
    assert_alike(federation.gathered(), federation.on_one_machine())


@pytest.mark.parametrize("killed", ["trunk", "north"])
def test_a_party_that_is_killed_after_a_move_comes_back_at_its_cut(
    commands: Commands, isthmus: Callable[..., Ended], tmp_path: Path, killed: str
) -> None:
    """Between the moves: it comes back with the cut of its files, and the recipe that it was given first."""
    federation = Federation(tmp_path, commands, together=True)
    isthmus("certificates", federation.recipe).succeeded()
    trunk = federation.start("trunk")
    for name in ("north", "south"):
        federation.start(name)
    until(lambda: "(2, 1) after round 2" in federation.started["south"].stderr, "the first move", command=trunk)
    federation.started["south"].process.suspend()
    federation.started["north"].process.suspend()
    federation.started[killed].process.kill()
    federation.started[killed].wait()
    federation.started["south"].process.resume()
    if killed != "north":
        federation.started["north"].process.resume()
    federation.start(killed)
    for name in ("north", "south"):
        federation.started[name].wait().succeeded()
    assert_alike(federation.gathered(), federation.on_one_machine())


def test_a_silo_that_comes_after_the_move_begins_at_the_new_cut(
    commands: Commands, isthmus: Callable[..., Ended], tmp_path: Path
) -> None:
    federation = Federation(tmp_path, commands, together=True, train={"steps": 20}, root={"minimum": 1}, patience=4.0)
    isthmus("certificates", federation.recipe).succeeded()
    trunk = federation.start("trunk")
    north = federation.start("north")
    until(lambda: "(2, 1) after round 2" in north.stderr, "the first move", command=trunk)
    south = federation.start("south")
    for silo in (north, south):
        silo.wait().succeeded()
    lines = read_journal(federation.run_of("south") / "silos" / "south" / "metrics.jsonl")
    rounds = {line["round"] for line in lines if line["event"] == "step"}
    assert rounds
    assert min(rounds) > 2
    assert max(rounds) == ROUNDS
    assert "it moves in this run, and one of them is behind" in south.stderr
