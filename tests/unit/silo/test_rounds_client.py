"""The client of the trunk's rounds: begun by hand, or opened by the first step, saved and restored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.errors import NotSupportedError, ProtocolError, RoundLostError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.optimizer_settings import OptimizerSettings
from isthmus.recipe import Recipe
from isthmus.silo.join import greeting
from isthmus.silo.rounds_client import RoundsClient, SavedRound
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import make_recipe, save_tiny_model

SGD = OptimizerSettings("sgd", 0.1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_recipe(save_tiny_model("llama", tmp_path_factory.mktemp("model")), silos=("a", "b"), train={"steps": 1})


@pytest.fixture
def service(recipe: Recipe, tmp_path: Path) -> Iterator[TrunkService]:
    made = TrunkService(recipe, RunDirectory(tmp_path).role("trunk"))
    yield made
    made.stop()


def client(service: TrunkService, recipe: Recipe, name: str = "a") -> RoundsClient:
    hello = greeting(Checkpoint(recipe.model.path), recipe)
    return RoundsClient(LoopbackChannel(service, name, greeting=hello))


def test_steps_open_a_round_and_saving_ends_it(service: TrunkService, recipe: Recipe) -> None:
    rounds = client(service, recipe)
    saved = rounds.save()
    assert saved is not None
    assert saved.number == 0
    for number in (1, 2):
        for _ in range(3):
            rounds.step(0, SGD, None)
        saved = rounds.save()
        assert saved == SavedRound(number, service._training.digest(number)) == rounds.save()
    rounds.restore(SavedRound(1, b""))
    assert rounds.save() == SavedRound(1, service._training.digest(1))
    rounds.step(0, SGD, None)
    saved = rounds.save()
    assert saved is not None
    assert saved.number == 3


def test_rounds_begun_by_hand_are_committed_by_hand(service: TrunkService, recipe: Recipe) -> None:
    rounds = client(service, recipe)
    rounds.begin(1, ["a"])
    assert (rounds.by_hand, rounds.save()) == (True, None)
    assert rounds.commit(1, 1, 0.0) == 1
    rounds.restore(SavedRound(1, b""))
    assert not rounds.by_hand


def test_a_lost_round_names_the_last_one_saved(service: TrunkService, recipe: Recipe) -> None:
    a, b = client(service, recipe), client(service, recipe, "b")
    a.step(0, SGD, None)
    a.save()
    a.step(0, SGD, None)
    with pytest.raises(ProtocolError, match="a is training"):
        b.step(0, SGD, None)
    b.restore(SavedRound(1, b""))
    with pytest.raises(RoundLostError, match="since its round 1") as lost:
        a.step(0, SGD, None)
    assert "last model that was saved" in lost.value.remedy


def test_a_federation_with_a_buffer_has_no_open_rounds(recipe: Recipe, tmp_path: Path) -> None:
    asynchronous = {"federation": {"asynchronous": {"buffer": 1}}}
    buffered = make_recipe(Path(recipe.model.path), silos=("a", "b"), **asynchronous)
    service = TrunkService(buffered, RunDirectory(tmp_path).role("trunk"))
    rounds = client(service, buffered)
    with pytest.raises(NotSupportedError, match="with a buffer"):
        rounds.step(0, SGD, None)
    service.stop()
