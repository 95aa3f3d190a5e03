"""Blocks between: what the trunk trained of them, once, and the root's tensors in their place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isthmus.errors import CutError, ProtocolError, RoundLostError
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, load_part
from isthmus.recipe import LoraSection, Recipe, TrainSection
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.adapter import SharedAdapter
from isthmus.trunk.between import BetweenBlocks
from isthmus.trunk.service import TrunkService
from tests.conftest import make_recipe, save_tiny_model

RATE = 0.5
PASSED = {"a": range(3), "b": range(1, 3), "c": range(1, 2)}
"""Of three blocks, 1 to 3 of the model's five."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def shared(folder: Path) -> SharedAdapter:
    part = load_part(Checkpoint(str(folder)), Cut(1, 1), "trunk")
    adapters.add_adapter(part, LoraSection(rank=2), 0, freeze_a=True)
    train = TrainSection(optimizer="sgd", learning_rate=RATE, steps=2, max_grad_norm=1e9)
    return SharedAdapter(part, train, PASSED)


def step(shared: SharedAdapter, **silos: tuple[float, float]) -> None:
    """One step with gradients of this value, and this weight, of each silo."""
    named = shared.leaves("a")
    given = {
        silo: (weight, [torch.full_like(one, value) for one in named.values()])
        for silo, (weight, value) in silos.items()
    }
    shared.step(given, together=True)


def of_block(shared: SharedAdapter, block: int) -> set[float]:
    named = shared.leaves("a").items()
    return {float(value) for name, one in named if f".{block}." in name for value in one.detach().unique()}


def test_a_step_is_the_mean_of_those_who_pass_the_block(shared: SharedAdapter) -> None:
    step(shared, a=(1.0, 4.0), b=(1.0, 8.0), c=(2.0, 2.0))
    assert of_block(shared, 1) == {-RATE * 4.0}
    assert of_block(shared, 2) == {-RATE * 4.0}
    assert of_block(shared, 3) == {-RATE * 6.0}


def test_a_block_that_nobody_passes_rests(shared: SharedAdapter) -> None:
    step(shared, b=(1.0, 8.0), c=(3.0, 4.0))
    assert of_block(shared, 1) == {0.0}
    assert of_block(shared, 2) == {-RATE * 5.0}
    step(shared, c=(3.0, 4.0))
    assert of_block(shared, 3) == {-RATE * 8.0}


def test_a_rounds_change_counts_for_those_who_passed(shared: SharedAdapter) -> None:
    between = BetweenBlocks(shared)
    between.begin()
    for _ in range(2):
        step(shared, a=(1.0, 4.0), b=(2.0, 4.0))
        between.count({"a": 1.0, "b": 2.0})
    between.save(1)
    step(shared, a=(1.0, 4.0))  # a silo that is late changes nothing of what was saved
    found = {one.weight: one.change for one in between.trained(1)}
    assert found.keys() == {2.0, 6.0}
    assert all(".1." in name for name in found[2.0])
    assert all(".3." in name for name in found[6.0])
    assert all(torch.equal(one, torch.full_like(one, -4.0)) for change in found.values() for one in change.values())
    with pytest.raises(RoundLostError, match="has not saved round 2"):
        between.trained(2)


def test_the_roots_tensors_replace_the_own_and_the_next_round_begins_there(shared: SharedAdapter) -> None:
    between = BetweenBlocks(shared)
    names = shared.between()
    given = {name: torch.ones_like(one) for name, one in names.items()} | {"elsewhere": torch.ones(1)}
    before, version = of_block(shared, 2), shared.version("a")
    assert between.settle(given)
    assert not between.settle(given)
    assert of_block(shared, 1) == of_block(shared, 3) == {1.0}
    assert of_block(shared, 2) == before
    assert shared.version("a") != version
    between.save(4)
    assert all(not one.any() for group in between.trained(4) for one in group.change.values())


@pytest.fixture
def services(folder: Path) -> Iterator[list[TrunkService]]:
    opened: list[TrunkService] = []
    yield opened
    for one in opened:
        one.stop()


def mixed(folder: Path, **silo: int) -> Recipe:
    silos = [{"name": "a", "train": "a.jsonl"}, {"name": "b", "train": "b.jsonl", **silo}]
    return make_recipe(folder, silo=silos, federation={"between": "train"})


def test_a_trunk_keeps_the_roots_tensors_and_what_it_trained(
    folder: Path, services: list[TrunkService], tmp_path: Path
) -> None:
    recipe, store = mixed(folder, bottom=2), RoleDirectory(tmp_path)
    services.append(TrunkService(recipe, store))
    present = services[0]._training._adapter.between()  # type: ignore[attr-defined]
    assert present
    given = {name: torch.ones_like(one) for name, one in present.items()}
    trained = services[0].trained(0).result()
    services[0].settle(0, given).result()
    services.append(TrunkService(recipe, store))
    kept = adapters.adapter_of(services[1]._runner.part)
    assert all(torch.equal(kept[name], one) for name, one in given.items())
    assert [one.weight for one in services[1].trained(0).result()] == [one.weight for one in trained]
    with pytest.raises(ProtocolError, match="no state of round 3"):
        services[1].settle(3, given).result()


@pytest.mark.parametrize(
    ("ends", "fits"),
    [({"bottom": 4}, False), ({"bottom": 3, "top": 2}, False), ({"bottom": 3}, True)],
)
def test_a_cut_that_leaves_nothing_is_refused(
    ends: dict[str, int], fits: bool, folder: Path, services: list[TrunkService], tmp_path: Path
) -> None:
    if fits:
        services.append(TrunkService(mixed(folder, **ends), RoleDirectory(tmp_path)))
        return
    with pytest.raises(CutError, match="no block of 5 is left that all silos leave to the trunk") as caught:
        TrunkService(mixed(folder, **ends), RoleDirectory(tmp_path))
    assert "lower silo.bottom or silo.top" in caught.value.remedy
