"""A trunk over ranks that torchrun starts, with silos over mTLS."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from isthmus.engines.certificates import make_certificates
from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory
from tests.conftest import save_tiny_model
from tests.integration.processes import (
    Command,
    Commands,
    free_port,
    run_here,
    silos_here,
    states,
    until,
    until_step,
    write_federation,
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]


def federation(folder: Path) -> Path:
    address: dict[str, Any] = {"address": f"localhost:{free_port()}"}
    train = {"rounds": 2, "steps": 15, "evaluate": False, "learning_rate": 1e-3}
    recipe = write_federation(folder, train=train, trunk=address, root=address)
    read = Recipe.read(recipe)
    make_certificates(read, Path(read.wire.certificates))
    return recipe


def rank(torchrun: Command, number: int) -> psutil.Process:
    """The process of this rank."""
    for process in torchrun.process.children(recursive=True):
        if process.environ().get("RANK") == str(number):
            return process
    raise AssertionError(f"no process of rank {number}")


def test_a_rank_is_killed_and_what_is_learned_is_that_of_a_trunk_alone(commands: Commands, tmp_path: Path) -> None:
    """Rank 0 names the rank that is gone, torchrun starts all again, the silos repeat the round."""
    recipe, run = federation(tmp_path / "made"), tmp_path / "run"
    launcher = ("--nproc-per-node", "2", "--max-restarts", "1", "--master-port", str(free_port()), "-m")
    trunk = commands.start(
        *("trunk", recipe, "--with-root", "--run-dir", run), launcher=("torch.distributed.run", *launcher)
    )
    with silos_here(Recipe.read(recipe), RunDirectory(run)):
        until_step(run, 2, 3, trunk)
        rank(trunk, 1).kill()
    assert "error: rank 1, which holds some of the trunk's blocks, is gone" in trunk.stderr
    until(lambda: "finished after 2 rounds" in trunk.stdout, "the trunk to save the last round", command=trunk)
    before = trunk.stderr.count("error: ")
    others = trunk.process.children(recursive=True)
    trunk.process.send_signal(signal.SIGTERM)
    trunk.wait()
    assert not any(process.is_running() for process in others)
    assert trunk.stderr.count("error: ") == before, "all ranks end well"

    run_here(recipe, tmp_path / "alone")
    shutil.copy(recipe, run / "recipe.toml")
    found, expected = states(run, 2), states(tmp_path / "alone", 2)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def test_ranks_with_different_checkpoints_are_refused(commands: Commands, tmp_path: Path) -> None:
    """On every rank, by the name of the one that differs."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    recipes = [federation(tmp_path / f"rank{number}") for number in range(2)]
    save_tiny_model("llama", recipes[1].parent / "model", seed=1)
    ranks = [
        commands.start("trunk", recipe, environment={**place, "RANK": str(number), "LOCAL_RANK": str(number)})
        for number, recipe in enumerate(recipes)
    ]
    for one in ranks:
        one.wait().failed("rank 1 and rank 0 have different base models", "give all ranks the same files at model.path")
