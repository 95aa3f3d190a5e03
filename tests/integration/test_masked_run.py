"""A federation of real processes whose updates are summed under masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.engines.local import create_run
from isthmus.recipe import Recipe
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from isthmus.updates.quantize import Ring
from tests.conftest import write_rows
from tests.integration.processes import (
    Commands,
    rows_of,
    run_here,
    served_here,
    silos_here,
    steps_of,
    until,
    write_federation,
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
SILOS = ("east", "north", "south", "west")
ROUNDS, RATE = 2, 0.1
RANGES = {"changes": 0.5, "gradients": 8.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    for name in SILOS:
        write_rows(folder / f"{name}.jsonl", rows_of(name))
    return folder


def recipe(folder: Path, name: str, steps: int = 6, **sections: object) -> Path:
    written = write_federation(
        folder,
        silo=[{"name": silo, "train": f"{silo}.jsonl"} for silo in SILOS],
        train={"rounds": ROUNDS, "steps": steps, "optimizer": "sgd", "learning_rate": RATE, "evaluate": False},
        **sections,
    )
    return written.rename(folder / f"{name}.toml")


def shared(run: Path, round: int) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = RunDirectory.open(run).role("root").load_round(round)["shared"]
    return tensors


@pytest.mark.parametrize("updates", ["changes", "gradients"])
def test_a_masked_round_learns_what_an_open_one_does(updates: str, folder: Path, tmp_path: Path) -> None:
    """All silos train on equally many rows, so both weigh alike; each silo's numbers are rounded, that is all."""
    runs, steps = {}, 1 if updates == "gradients" else 6
    for name, masks in (("open", False), ("masked", True)):
        runs[name] = tmp_path / name
        federation = {"updates": updates, "secure": {"masks": masks, "range": RANGES[updates]}}
        run_here(recipe(folder, name, steps, federation=federation), runs[name])
    for name in SILOS:
        weights = [line["weights"] for line in read_journal(runs["open"] / "root/metrics.jsonl")]
        assert len({line[name] for line in weights}) == 1
    step = Ring(len(SILOS), RANGES[updates]).step * (RATE if updates == "gradients" else 1)
    plain, masked = shared(runs["open"], 1), shared(runs["masked"], 1)
    assert max(float(tensor.abs().max()) for tensor in plain.values()) > 20 * step
    for key, tensor in plain.items():
        assert (masked[key] - tensor).abs().max() <= 1.1 * step
    journal = read_journal(runs["masked"] / "root/metrics.jsonl")
    assert [line["weights"] for line in journal] == [dict.fromkeys(SILOS, 1.0)] * ROUNDS


def test_the_rest_goes_on_when_a_silo_is_killed(folder: Path, tmp_path: Path, commands: Commands) -> None:
    sections = {"root": {"minimum": 3, "patience": 8.0}, "trunk": {"patience": 2.0}, "federation": {"secure": True}}
    made = create_run(Recipe.read(recipe(folder, "killed", **sections)), tmp_path / "run")
    run = made.path
    with served_here(made) as there:
        address = there.trunk.address
        west = commands.start("silo", made.recipe_path, "west", "--run-dir", run, "--trunk", address, "--root", address)
        ledger = made.role("west").path / "ledger.jsonl"
        until(ledger.exists, "west to start", command=west)  # the others wait for it so long, and no longer
        with silos_here(there, made, "east", "north", "south"):
            until(lambda: all(steps_of(run, name) for name in SILOS), "all silos' first steps", command=west)
            west.process.kill()
    rounds = read_journal(run / "root/metrics.jsonl")
    assert [line["round"] for line in rounds] == [1, 2]
    assert list(rounds[-1]["weights"]) == ["east", "north", "south"]
