"""A silo's worker: its rounds from plan to update, what it writes, and when it gives up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from isthmus.errors import DataError, RoundLostError
from isthmus.federation.aggregator import root_service
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import Recipe
from isthmus.silo.worker import Worker
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel
from tests.conftest import make_recipe, save_tiny_model, write_rows
from tests.oracle.twins import loopback

ROUNDS, STEPS = 2, 2


class Losing(LoopbackChannel):
    """A way to the root on which every update is lost."""

    def submit(self, request: Message) -> Answer:
        if isinstance(request, pb.Update):
            raise RoundLostError("gone on", remedy="ask")
        return super().submit(request)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def recipe_of(folder: Path, place: Path, **sections: Any) -> Recipe:
    rows = str(write_rows(place / "rows.jsonl", [{"prompt": f"w{number}", "answer": "w5"} for number in range(6, 10)]))
    silo = {"name": "a", "train": rows, "held_out": rows}
    train = {"rounds": ROUNDS, "steps": STEPS, "batch": 2, "evaluate": True, "learning_rate": 0.01}
    return make_recipe(folder, **{"silo": [silo], "train": train, **sections})


def run(recipe: Recipe, directory: RunDirectory, way: type[LoopbackChannel] = LoopbackChannel) -> None:
    trunk, root = TrunkService(recipe, directory.role("trunk")), root_service(recipe, directory.role("root"))
    try:
        worker = Worker(recipe, "a", directory.role("a"), trunk=loopback(trunk, "a", recipe), root=way(root, "a"))
        try:
            worker.run()
        finally:
            worker.close()
    finally:
        trunk.stop()


def test_it_takes_part_to_the_end_and_writes_what_it_did(folder: Path, tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run", recipe_of(folder, tmp_path))
    run(directory.recipe(), directory)
    lines = read_journal(directory.role("a").path / "metrics.jsonl")
    assert [(line["round"], line["step"]) for line in lines if line["event"] == "step"] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
    ]
    measured = [line for line in lines if line["event"] == "evaluation"]
    assert [line["round"] for line in measured] == [0, 1, 2]
    assert measured[-1]["loss"] < measured[0]["loss"]
    paths = [release.path for release in read_ledger(directory.role("a").path / "ledger.jsonl").releases()]
    assert paths.count("update") == ROUNDS
    assert directory.role("a").rounds() == {1, 2}


def test_updates_are_noted_with_their_size(folder: Path, tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run", recipe_of(folder, tmp_path))
    run(directory.recipe(), directory)
    lines = read_journal(directory.role("a").path / "metrics.jsonl")
    updates = [line for line in lines if line["event"] == "update"]
    assert [line["round"] for line in updates] == [1, 2]
    released = read_ledger(directory.role("a").path / "ledger.jsonl").releases()
    sizes = [release.size for release in released if release.path == "update"]
    for line, size in zip(updates, sizes, strict=True):
        assert size < line["own_sent_bytes"] < 1.1 * size  # names and shapes of tensors
        assert line["own_received_bytes"] >= size


@pytest.mark.parametrize("limit", [0.01, None])
def test_a_silo_whose_budgets_allow_no_row_says_so(
    limit: float | None, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noise = {"mechanism": "dp_gaussian", "clip": 1.0, "epsilon": 8.0, "delta": 1e-5}
    sections: dict[str, Any] = {"boundary": {"forward": noise, "gradient": noise}}
    if limit is not None:
        sections["privacy"] = {"record_epsilon": limit}
    directory = RunDirectory.create(tmp_path / "run", recipe_of(folder, tmp_path, **sections))
    run(directory.recipe(), directory)
    assert ("this silo learned nothing" in caplog.text) == (limit is not None)


def test_after_the_end_it_has_nothing_to_do(folder: Path, tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run", recipe_of(folder, tmp_path))
    run(directory.recipe(), directory)
    ledger = (directory.role("a").path / "ledger.jsonl").read_bytes()
    run(directory.recipe(), directory)
    assert (directory.role("a").path / "ledger.jsonl").read_bytes() == ledger


def test_rounds_that_are_always_lost_are_given_up(folder: Path, tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run", recipe_of(folder, tmp_path))
    with pytest.raises(RoundLostError):
        run(directory.recipe(), directory, Losing)


def test_without_usable_rows_it_does_not_begin(folder: Path, tmp_path: Path) -> None:
    silo = {"name": "a", "train": str(tmp_path / "none.jsonl")}
    directory = RunDirectory.create(tmp_path / "run", make_recipe(folder, silo=[silo]))
    with pytest.raises(DataError, match=r"none\.jsonl"):
        run(directory.recipe(), directory)
