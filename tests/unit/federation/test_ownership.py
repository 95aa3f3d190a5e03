"""Sharing among different cuts: each tensor is the mean of those who have it; and the root's way with the trunk."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from isthmus.errors import RecipeError, RoundLostError
from isthmus.federation.aggregator import root_service
from isthmus.federation.collection import Collected
from isthmus.federation.contribution import Contribution
from isthmus.federation.ownership import OwnedSharing
from isthmus.federation.planner import RootPlanner, shared_tensors
from isthmus.recipe import Recipe
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RoleDirectory
from isthmus.updates.between import BlocksChange
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import make_recipe, save_tiny_model

CUTS = {"a": (1, 1), "b": (2, 1), "c": (2, 2)}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    model = save_tiny_model("llama", tmp_path_factory.mktemp("model"))
    silos = [{"name": name, "train": "x.jsonl", "bottom": one, "top": two} for name, (one, two) in CUTS.items()]
    return make_recipe(model, silo=silos, federation={"between": "train"}, lora={"rank": 2}, train={"rounds": 2})


def blocks(names: object) -> set[int]:
    return {int(name.split("layers.")[1].split(".")[0]) for name in names}  # type: ignore[attr-defined]


def changed(sharing: OwnedSharing, shared: dict[str, torch.Tensor], silo: str, value: float) -> Contribution:
    own = sharing.held(shared, silo)
    return Contribution(silo, 1.0, {name: torch.full_like(one, value) for name, one in own.items()})


def test_each_silo_gets_its_own_blocks(recipe: Recipe) -> None:
    sharing, shared = OwnedSharing(recipe), shared_tensors(recipe)
    assert blocks(shared) == {0, 1, 3, 4}
    held = {name: blocks(sharing.held(shared, name)) for name in CUTS}
    assert held == {"a": {0, 4}, "b": {0, 1, 4}, "c": {0, 1, 3, 4}}
    assert sharing.begun(shared, "a") is sharing.begun(shared, "a")
    assert sharing.layout(sharing.begun(shared, "b"), 1).shapes.keys() == sharing.held(shared, "b").keys()


def test_each_block_is_the_mean_of_those_who_have_it(recipe: Recipe) -> None:
    sharing, shared = OwnedSharing(recipe), shared_tensors(recipe)
    silos = [changed(sharing, shared, name, value) for name, value in (("a", 1.0), ("b", 4.0), ("c", 7.0))]
    trunk = [
        Contribution(
            "trunk", 2.0, {name: torch.full_like(one, -3.0) for name, one in shared.items() if f".{block}." in name}
        )
        for block in (1, 3)
    ]
    after = sharing.next(shared, 1, [*silos, *trunk])
    expected = {0: 4.0, 1: (4 + 7 - 6) / 4, 3: (7 - 6) / 3, 4: 4.0}
    for name, one in after.items():
        (block,) = blocks([name])
        torch.testing.assert_close(one - shared[name], torch.full_like(one, expected[block]))
    assert sharing.shares == {name: pytest.approx(1 / 3) for name in CUTS}
    rest = sharing.next(after, 2, silos[:1])  # nobody who has them came
    assert all(torch.equal(rest[name], after[name]) for name in rest if blocks([name]) <= {1, 3})


class Trunk:
    """Takes down what the root asks, and answers what it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.error: Exception | None = None
        self.changes: list[BlocksChange] = []
        self.settled: dict[str, torch.Tensor] = {}

    def trained(self, round: int) -> Future[list[BlocksChange]]:
        self.asked.append(("trained", round))
        found: Future[list[BlocksChange]] = Future()
        if self.error is None:
            found.set_result(self.changes)
        else:
            found.set_exception(self.error)
        return found

    def settle(self, completed: int, shared: dict[str, torch.Tensor]) -> Future[None]:
        self.asked.append(("settle", completed))
        self.settled = dict(shared)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def test_the_trunk_has_the_roots_tensors_before_any_silo(recipe: Recipe, tmp_path: Path) -> None:
    trunk, store = Trunk(), RoleDirectory(tmp_path)
    planner = RootPlanner(recipe, shared_tensors(recipe), store, trunk)
    sharing = OwnedSharing(recipe)
    plan = planner.plan(CUTS).result()
    assert isinstance(plan, pb.Plan)
    assert trunk.asked == [("settle", 0)]
    assert {name: blocks(one.name for one in planner.own(plan, name).adapters) for name in CUTS}["b"] == {0, 1, 4}
    silos = [changed(sharing, planner.shared, name, 1.0) for name in CUTS]
    own = {name: torch.full_like(one, 1.0) for name, one in planner.shared.items() if ".1." in name}
    trunk.changes = [BlocksChange(5.0, own), BlocksChange(0.0, {})]
    planner.conclude(1, Collected(dict.fromkeys(CUTS, 1.0), tuple(silos))).result()
    (line,) = read_journal(tmp_path / "metrics.jsonl")
    assert line["trunk"] == [5.0]
    again = RootPlanner(recipe, shared_tensors(recipe), store, trunk)  # ended before it told the trunk
    again.plan(CUTS).result()
    assert trunk.asked[1:] == [("trained", 1), ("settle", 1)]
    assert all(float(one.unique()) == 1.0 for name, one in trunk.settled.items() if ".1." in name)
    answer = again.current("a").result()
    assert isinstance(answer, pb.Adapters)
    assert blocks(codec.decode_named(answer.adapters, sharing.layout(sharing.held(again.shared, "a"), 1).shapes)) == {
        0,
        4,
    }


def test_a_round_that_the_trunk_has_lost_is_trained_again(recipe: Recipe, tmp_path: Path) -> None:
    trunk = Trunk()
    planner = RootPlanner(recipe, shared_tensors(recipe), RoleDirectory(tmp_path), trunk)
    trunk.error = RoundLostError("the trunk has not saved round 1", remedy="train the round again")
    with pytest.raises(RoundLostError):
        planner.conclude(1, Collected({}, ())).result()
    assert planner.completed == 0
    assert RoleDirectory(tmp_path).last_round() == 0


def test_a_root_alone_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="which is not in this process") as caught:
        root_service(recipe, RoleDirectory(tmp_path))
    assert "--with-root" in caught.value.remedy
