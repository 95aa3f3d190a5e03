"""A federation of real processes with edges between the silos and the root."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.storage.record import read_journal
from tests.conftest import write_rows
from tests.integration.processes import (
    Commands,
    rows_of,
    steps_of,
    until,
    write_federation,
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
LEFT, RIGHT = ("a", "b", "c"), ("d", "e", "f")
SILOS = (*LEFT, *RIGHT)
EDGES = [
    {"name": "left", "address": "localhost:7101", "silos": LEFT, "sibling": "right"},
    {"name": "right", "address": "localhost:7102", "silos": RIGHT},
]


def recipe(folder: Path, name: str, **sections: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for silo in SILOS:
        write_rows(folder / f"{silo}.jsonl", rows_of(silo))
    train = {"rounds": 3, "steps": 3, "optimizer": "sgd", "learning_rate": 0.1, "evaluate": False}
    values = {"silo": [{"name": silo, "train": f"{silo}.jsonl"} for silo in SILOS], "train": train, **sections}
    return write_federation(folder, **values).rename(folder / f"{name}.toml")


def test_silos_of_a_killed_edge_go_on_with_its_sibling(tmp_path: Path, commands: Commands) -> None:
    run = tmp_path / "run"
    sections = {
        "edge": EDGES,
        "root": {"minimum": 1, "patience": 40.0},
        "trunk": {"patience": 2.0},
        "wire": {"deadline": 2.0},
        "federation": {"masks": True},
    }
    command = commands.start("run", recipe(tmp_path, "killed", **sections), "--run-dir", run)
    until(lambda: all(steps_of(run, name) for name in SILOS), "all silos' first steps", command=command)
    command.role("left").kill()
    ended = command.wait()
    ended.succeeded()
    assert "edge left" in ended.out
    assert [line["round"] for line in read_journal(run / "root/metrics.jsonl")] == [1, 2, 3]
    last = read_journal(run / "edges/right/metrics.jsonl")[-1]
    assert (last["round"], sorted(last["weights"])) == (3, sorted(SILOS))


def test_an_edge_that_the_recipe_does_not_know(tmp_path: Path, commands: Commands) -> None:
    path = recipe(tmp_path, "known", edge=EDGES)
    commands.run("edge", path, "middle", "--run-dir", tmp_path / "run").failed("no edge 'middle'", "left, right")
    for told, words in (("middle=localhost:1", "no edge 'middle'"), ("left", "--edge left has no address")):
        commands.run("silo", path, "a", "--run-dir", tmp_path / "run", "--edge", told).failed(words)
