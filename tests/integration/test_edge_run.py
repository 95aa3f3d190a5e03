"""A federation of real processes with edges between the silos and the root."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.engines.local import at_edge, create_run
from isthmus.recipe import Recipe
from isthmus.storage.journal import read_journal
from tests.conftest import write_rows
from tests.integration.processes import (
    Commands,
    call,
    rows_of,
    served_here,
    silos_here,
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
    sections = {
        "edge": EDGES,
        "root": {"minimum": 1, "patience": 24.0},
        "trunk": {"patience": 2.0},
        "wire": {"deadline": 2.0},
        "federation": {"secure": True},
    }
    made = create_run(Recipe.read(recipe(tmp_path, "killed", **sections)), tmp_path / "run")
    run = made.path
    with served_here(made) as there:
        started = ("--run-dir", run, "--address", "localhost:0", "--parent", there.root.address)
        edges = {edge: commands.start("edge", made.recipe_path, edge, *started) for edge in ("left", "right")}
        for name, edge in edges.items():
            there = at_edge(there, f"{name}={edge.address}")
        with silos_here(there, made):
            until(lambda: all(steps_of(run, name) for name in SILOS), "all silos' first steps")
            edges["left"].process.kill()
    assert [line["round"] for line in read_journal(run / "root/metrics.jsonl")] == [1, 2, 3]
    last = read_journal(run / "edges/right/metrics.jsonl")[-1]
    assert (last["round"], sorted(last["weights"])) == (3, sorted(SILOS))


def test_an_edge_that_the_recipe_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = recipe(tmp_path, "known", edge=EDGES), tmp_path / "run"
    edge = call(capsys, monkeypatch, "edge", path, "middle", "--run-dir", run)
    edge.failed("no edge 'middle'", "left, right")
    for told, words in (("middle=localhost:1", "no edge 'middle'"), ("left", "--edge left has no address")):
        call(capsys, monkeypatch, "silo", path, "a", "--run-dir", run, "--edge", told).failed(words)
