"""An aggregator's service: which requests it answers, whose keys it believes, and which rounds it leads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import IdentityError, MismatchError, ProtocolError, RoundLostError
from isthmus.federation.aggregator import GreetedAggregator, aggregator_of, edge_service, root_service
from isthmus.federation.buffered import Buffered
from isthmus.federation.planner import RootPlanner, shared_tensors
from isthmus.federation.rounds import Aggregator, Rounds
from isthmus.model.agreement import hello_of
from isthmus.recipe import Recipe
from isthmus.storage.record import RoleDirectory
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.channel import LoopbackChannel
from isthmus.wire.sum_keys import sign_keys
from tests.conftest import make_recipe, save_tiny_model

SILOS = ("a", "b", "c")
KEYS = {"sealing": bytes([9]) + bytes(31), "masking": bytes([9]) + bytes(31), "commitment": bytes([9]) + bytes(31)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def recipe_of(folder: Path, **sections: Any) -> Recipe:
    return make_recipe(folder, silos=SILOS, **sections)


def root_of(recipe: Recipe, place: Path, **given: Any) -> Aggregator:
    return aggregator_of(recipe, "root", RootPlanner(recipe, shared_tensors(recipe), RoleDirectory(place)), **given)


def test_the_root_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder)
    service = root_service(recipe, RoleDirectory(tmp_path))
    answers = [service.handle(name, pb.Ready()) for name in SILOS]
    plan: Any = answers[0].result()
    assert (plan.round, list(plan.participants)) == (1, list(SILOS))
    assert len(plan.adapters) == len(shared_tensors(recipe))


@pytest.mark.parametrize(("buffer", "kind"), [(None, Rounds), (2, Buffered)])
def test_a_buffer_takes_the_place_of_rounds(folder: Path, tmp_path: Path, buffer: int | None, kind: type) -> None:
    federation = {} if buffer is None else {"asynchronous": {"buffer": buffer}}
    assert isinstance(root_of(recipe_of(folder, federation=federation), tmp_path), kind)


def test_a_ping_is_answered_and_the_trunks_frames_are_not(folder: Path, tmp_path: Path) -> None:
    service = root_of(recipe_of(folder), tmp_path)
    assert service.handle("a", pb.Ping()).result() == pb.Pong()
    with pytest.raises(ProtocolError, match="no aggregator answers Forward"):
        service.handle("a", pb.Forward())
    with pytest.raises(RoundLostError):
        service.handle("a", pb.Update(round=1))


def test_keys_that_a_silo_did_not_sign_are_refused(folder: Path, tmp_path: Path) -> None:
    authority = Authority()
    service = root_of(recipe_of(folder, federation={"secure": True}), tmp_path, identity=authority.issue("root"))
    own = sign_keys(authority.issue("a"), **KEYS)
    service.handle("a", pb.Ready(keys=own))
    with pytest.raises(IdentityError):
        service.handle("b", pb.Ready(keys=own))
    with pytest.raises(ProtocolError, match="offers no keys"):
        service.handle("b", pb.Ready())


def test_an_edge_asks_its_parent_for_its_silos(folder: Path, tmp_path: Path) -> None:
    edges = [
        {"name": "left", "address": "localhost:1", "silos": ["a", "b"]},
        {"name": "right", "address": "localhost:2", "silos": ["c"]},
    ]
    recipe = recipe_of(folder, edge=edges)
    root = root_of(recipe, tmp_path / "root")
    asked = []
    for edge in edges:
        name = str(edge["name"])
        service = edge_service(recipe, name, RoleDirectory(tmp_path / name), LoopbackChannel(root, name))
        asked += [service.handle(silo, pb.Ready()) for silo in edge["silos"]]
    assert [list(answer.result().participants) for answer in asked] == [list(SILOS)] * 3  # type: ignore[attr-defined]
    with pytest.raises(ProtocolError, match="c is no child of left"):
        edge_service(recipe, "left", RoleDirectory(tmp_path / "l"), LoopbackChannel(root, "left")).handle(
            "c", pb.Ready()
        )


def test_the_door_of_an_edge_says_whose_it_is(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder)
    door = GreetedAggregator(recipe, "left", root_service(recipe, RoleDirectory(tmp_path / "root")))
    with pytest.raises(MismatchError, match=r"a has seed = 7, the edge left 0"):
        door.handle("a", hello_of(recipe.model_copy(update={"seed": 7})))
    with pytest.raises(ProtocolError, match="before Hello"):
        door.handle("a", pb.Ready())
    assert door.handle("a", hello_of(recipe)).result() == pb.Welcome()
    assert door.handle("b", pb.Ping()).result() == pb.Pong()
    assert door.handle("b", pb.Ping(compared=hello_of(recipe))).result().time > 0  # type: ignore[attr-defined]
    with pytest.raises(MismatchError, match=r"b has seed = 7"):
        door.handle("b", pb.Ping(compared=hello_of(recipe.model_copy(update={"seed": 7}))))
    with pytest.raises(ProtocolError, match="before Hello"):
        door.handle("b", pb.Ready())
