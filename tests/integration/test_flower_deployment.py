"""A federation over Flower: a SuperLink with TLS and node authentication, SuperNodes, and parties that live on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isthmus.storage.record import RunDirectory
from tests.conftest import write_rows
from tests.integration.flowers import SuperLink, needs_flower
from tests.integration.processes import Command, Commands, rows_of, run_here, until, write_federation

pytestmark = [pytest.mark.process, pytest.mark.timeout(400), needs_flower]


class Parties:
    """Trunk, root and silos of a recipe as processes that wait for Flower."""

    def __init__(self, commands: Commands, recipe: Path, folder: Path, *silos: str) -> None:
        self.folder = folder
        folder.mkdir()
        commands.run("certificates", recipe).succeeded()
        commands.run("flower", recipe, folder / "app").succeeded()
        at = ("--address", "localhost:0", "--run-dir", self.run_of("root"), "--flower", self.socket("root"))
        self.server = commands.start("trunk", recipe, "--with-root", *at)
        address = self.server.address
        self.silos = {silo: self._silo(commands, recipe, silo, address) for silo in silos}

    def socket(self, name: str) -> Path:
        return self.folder / f"{name}.sock"

    def run_of(self, name: str) -> Path:
        return self.folder / f"run-{name}"

    def completed(self) -> int:
        return max(RunDirectory(self.run_of("root")).role("root").rounds(), default=0)

    def shared(self, round: int) -> dict[str, torch.Tensor]:
        return shared_of(self.run_of("root"), round)

    def _silo(self, commands: Commands, recipe: Path, silo: str, address: str) -> Command:
        at = ("--trunk", address, "--run-dir", self.run_of(silo), "--flower", self.socket(silo))
        return commands.start("silo", recipe, silo, *at)


def shared_of(run: Path, round: int) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = RunDirectory(run).role("root").load_round(round)["shared"]
    return tensors


@pytest.fixture
def link(tmp_path: Path) -> Iterator[SuperLink]:
    with SuperLink(tmp_path / "flower") as made:
        yield made


def test_three_rounds_with_a_node_that_restarts_and_one_with_a_wrong_key(
    link: SuperLink, commands: Commands, tmp_path: Path
) -> None:
    recipe = write_federation(tmp_path / "federation", train={"rounds": 3, "steps": 4, "evaluate": False})
    parties = Parties(commands, recipe, tmp_path / "parties", "north", "south")
    keys = {silo: link.key(silo) for silo in ("north", "south")}
    nodes = {silo: link.node(keys[silo], silo, parties.socket(silo)) for silo in ("north", "south")}
    stranger = link.node(link.key("stranger", register=False), "south", parties.socket("south"))
    run = link.run(tmp_path / "parties" / "app", "--run-config", f'root="{parties.socket("root")}"')
    run_here(recipe, tmp_path / "plain")
    until(parties.completed, "the first round", command=parties.server)
    nodes["south"].stop()
    link.node(keys["south"], "south", parties.socket("south"))
    for silo in parties.silos.values():
        silo.wait().succeeded()
    assert run.process.wait(60) == 0, run.output
    found, expected = parties.shared(3), shared_of(tmp_path / "plain", 3)
    assert all(torch.equal(found[name], one) for name, one in expected.items())
    assert "Sent successfully" not in stranger.output, stranger.output


def test_a_masked_round(link: SuperLink, commands: Commands, tmp_path: Path) -> None:
    """Each silo rounds its numbers with a secret draw: two runs without Flower differ as much."""
    silos = ("east", "north", "south")
    (tmp_path / "federation").mkdir()
    for silo in silos:
        write_rows(tmp_path / "federation" / f"{silo}.jsonl", rows_of(silo))
    recipe = write_federation(
        tmp_path / "federation",
        silo=[{"name": silo, "train": f"{silo}.jsonl"} for silo in silos],
        train={"rounds": 1, "steps": 4, "evaluate": False, "optimizer": "sgd", "learning_rate": 0.1},
        federation={"secure": {"masks": True}},
    )
    parties = Parties(commands, recipe, tmp_path / "parties", *silos)
    for silo in silos:
        link.node(link.key(silo), silo, parties.socket(silo))
    run = link.run(tmp_path / "parties" / "app", "--run-config", f'root="{parties.socket("root")}"')
    run_here(recipe, tmp_path / "plain")
    for one in parties.silos.values():
        one.wait().succeeded()
    assert run.process.wait(60) == 0, run.output
    found, expected = parties.shared(1), shared_of(tmp_path / "plain", 1)
    assert all(torch.allclose(found[name], one, rtol=0, atol=1e-4) for name, one in expected.items())
