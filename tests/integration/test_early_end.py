"""A federation that is ended early by one command, keeps its rounds, and goes on as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory
from tests.integration.processes import (
    Commands,
    assert_same,
    free_port,
    run_here,
    states,
    until,
    until_step,
    write_federation,
    write_recipe,
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
ROUNDS = 12
"""So many that some are left when the command has started, however long that takes."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_federation(tmp_path_factory.mktemp("federation"), train={"rounds": ROUNDS})


def test_a_run_that_was_ended_early_goes_on_to_the_same_adapters(
    recipe: Path, commands: Commands, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = commands.start("run", recipe, "--run-dir", run)
    until_step(run, 2, 5, command)
    aborted = commands.run("abort", run, "--json")
    aborted.succeeded()
    told = json.loads(aborted.out)
    ended = command.wait()
    ended.succeeded()
    completed = RunDirectory.open(run).completed()
    assert 1 <= told["completed"] <= completed < ROUNDS == told["rounds"]
    early = f"ended early, after {completed} of {ROUNDS} rounds"
    assert early in ended.err
    for name in ("north", "south"):
        assert early in (run / "logs" / f"{name}.log").read_text()
    commands.run("generate", run, "w5 w6").succeeded()  # the rounds that are finished can be used
    commands.run("run", "--resume", run).succeeded()
    run_here(recipe, tmp_path / "undisturbed")
    assert_same(states(run, ROUNDS), states(tmp_path / "undisturbed", ROUNDS))
    commands.run("abort", run).failed(f"no round is left: {ROUNDS} of {ROUNDS} are finished")


def test_deployed_silos_hear_that_it_is_over_and_others_hear_it_when_they_come(
    recipe: Path, commands: Commands, tmp_path: Path
) -> None:
    address = {"address": f"localhost:{free_port()}"}
    train = {"rounds": 100_000, "steps": 4, "evaluate": False}
    path = write_recipe(recipe.parent / "deployed.toml", train=train, trunk=address, root={**address, "minimum": 1})
    commands.run("certificates", path).succeeded()
    server = commands.start("trunk", path, "--with-root", "--run-dir", tmp_path / "run")
    north = commands.start("silo", path, "north", "--run-dir", tmp_path / "north")
    south = commands.start("silo", path, "south", "--run-dir", tmp_path / "south")
    root = RunDirectory(tmp_path / "run").role("root")
    until(lambda: max(root.rounds(), default=0) >= 2, "two rounds", command=server)
    commands.run("abort", tmp_path / "run").succeeded()
    for silo in (north, south):
        ended = silo.wait()
        ended.succeeded()
        assert "ended early, after " in ended.out
    assert f"of {Recipe.read(path).train.rounds} rounds; silos hear of it" in server.stdout
    late = commands.run("silo", path, "south", "--run-dir", tmp_path / "south")
    late.succeeded()
    assert "ended early, after " in late.out
    server.process.terminate()
    server.wait()

    before = max(root.rounds())
    server = commands.start("trunk", path, "--with-root", "--run-dir", tmp_path / "run")
    commands.start("silo", path, "north", "--run-dir", tmp_path / "north")
    commands.start("silo", path, "south", "--run-dir", tmp_path / "south")
    until(lambda: max(root.rounds()) >= before + 2, "the rounds to go on", command=server)


def test_nothing_that_could_end(recipe: Path, commands: Commands, tmp_path: Path) -> None:
    run = tmp_path / "run"
    commands.run("abort", run).failed()
    RunDirectory(run).record(Recipe.read(recipe))
    commands.run("abort", run).failed(f"no root runs in {run}", "name the run directory")
    assert not (run / "root" / "end-early").exists()
