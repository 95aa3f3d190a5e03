"""Names that are no silos: one message with thousands of them neither ends a federation nor is waited for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import ProtocolError
from isthmus.federation.aggregator import aggregator_of
from isthmus.federation.planner import RootPlanner
from isthmus.federation.rounds import Aggregator
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import greeting
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import make_recipe, save_tiny_model

GHOSTS = [f"ghost-{number}" for number in range(5000)]
EDGES = [
    {"name": "left", "address": "localhost:1", "silos": ["a", "b"], "sibling": "right"},
    {"name": "right", "address": "localhost:2", "silos": ["c", "d"]},
]


def root(recipe: Recipe, folder: Path) -> Aggregator:
    return aggregator_of(recipe, "root", RootPlanner(recipe, {"x": torch.zeros(3)}, RoleDirectory(folder)), None)


@pytest.mark.parametrize("named", [GHOSTS, ["b"], ["a", "a"], ["root"]], ids=["ghosts", "another", "twice", "root"])
@pytest.mark.parametrize("federation", [{}, {"asynchronous": {"buffer": 2}}], ids=["rounds", "buffered"])
def test_a_silo_names_no_other(named: list[str], federation: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_recipe(Path("none"), silos=("a", "b"), train={"rounds": 2, "evaluate": False}, federation=federation)
    service = root(recipe, tmp_path)
    with pytest.raises(ProtocolError, match="a names"):
        service.handle("a", pb.Ready(silos=named))
    answers = [service.handle(name, pb.Ready()) for name in ("a", "b")]
    plans: list[Any] = [answer.result(10) for answer in answers]
    assert [plan.round for plan in plans] == [1, 1]
    assert all(set(plan.participants) <= {"a", "b"} for plan in plans)


@pytest.mark.parametrize("named", [GHOSTS, ["a", "a"], ["c", "right"]], ids=["ghosts", "twice", "an edge"])
def test_an_edge_names_silos_that_it_may_have(named: list[str], tmp_path: Path) -> None:
    recipe = make_recipe(Path("none"), silos=tuple("abcd"), train={"rounds": 2, "evaluate": False}, edge=EDGES)
    service = root(recipe, tmp_path)
    with pytest.raises(ProtocolError, match="names"):
        service.handle("left", pb.Ready(silos=named))
    with pytest.raises(ProtocolError, match="'c', which is no silo that it may name"):
        service.handle("left", pb.Ready(silos=["a", "c"]))
    answers = [service.handle("left", pb.Ready(silos=["b"])), service.handle("right", pb.Ready(silos=["a", "c", "d"]))]
    plan: Any = answers[0].result(10)
    assert list(plan.participants) == ["a", "b", "c", "d"]  # a has turned to its edge's sibling


@pytest.mark.parametrize("named", [["a", *GHOSTS[:99]], ["a", "a"], ["a", "trunk"]], ids=["ghosts", "twice", "trunk"])
def test_the_trunk_waits_for_silos_of_the_recipe_alone(named: list[str], tmp_path: Path) -> None:
    recipe = make_recipe(save_tiny_model("llama", tmp_path / "model"), silos=("a", "b"))
    service = TrunkService(recipe, RoleDirectory(tmp_path / "trunk"))
    try:
        hello = greeting(Checkpoint(recipe.model.path), recipe)
        a, b = (LoopbackChannel(service, name, greeting=hello) for name in ("a", "b"))
        with pytest.raises(ProtocolError, match="a names"):
            a.call(pb.Begin(round=1, participants=named))
        begun = [channel.submit(pb.Begin(round=1, participants=["a", "b"])) for channel in (a, b)]
        assert all(isinstance(answer.result(30), pb.Begun) for answer in begun)
    finally:
        service.stop()
