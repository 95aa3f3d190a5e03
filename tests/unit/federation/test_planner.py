"""Planners: the root's goes on from what is on its disk, an edge's asks its parent and passes one sum up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus.errors import ProtocolError, RoundLostError
from isthmus.federation.collection import Collected
from isthmus.federation.contribution import Contribution
from isthmus.federation.planner import EdgePlanner, RootPlanner
from isthmus.storage.journal import Journal, read_journal
from isthmus.storage.record import RoleDirectory
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel, answered
from tests.conftest import make_recipe

SHAPES = {"x": (3,)}
ZEROS = {"x": torch.zeros(3)}
RECIPE = make_recipe(Path("none"), silos=("a", "b"), train={"rounds": 2})


def root(folder: Path) -> RootPlanner:
    return RootPlanner(RECIPE, ZEROS, RoleDirectory(folder))


def collected(**changes: float) -> Collected:
    learned = tuple(Contribution(name, 1.0, {"x": torch.full((3,), value)}) for name, value in changes.items())
    return Collected(dict.fromkeys(changes, 1.0), learned)


def test_a_plan_names_the_round_its_silos_and_what_they_begin_with(tmp_path: Path) -> None:
    planner = root(tmp_path)
    plan = planner.own(planner.next({"b", "a"}), "a")
    assert (plan.round, plan.completed, list(plan.participants)) == (1, 0, ["a", "b"])
    assert torch.equal(codec.decode_named(plan.adapters, SHAPES)["x"], ZEROS["x"])


def test_what_a_round_brought_is_on_the_disk_and_continued_from(tmp_path: Path) -> None:
    planner = root(tmp_path)
    planner.conclude(1, collected(a=1.0, b=3.0)).result()
    again = root(tmp_path)
    assert again.completed == planner.completed == 1
    assert again.shared["x"].tolist() == [2.0] * 3
    assert [line["weights"] for line in read_journal(tmp_path / "metrics.jsonl")] == [{"a": 1.0, "b": 1.0}]


def test_a_root_that_ends_between_a_rounds_file_and_its_line_writes_the_line_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = root(tmp_path)
    planner.conclude(1, collected(a=1.0)).result()
    with monkeypatch.context() as killed:
        killed.setattr(Journal, "append", lambda *_: pytest.fail("the process ends here"))
        with pytest.raises(pytest.fail.Exception):
            planner.conclude(2, collected(a=1.0, b=3.0))
    assert [line["round"] for line in read_journal(tmp_path / "metrics.jsonl")] == [1]
    for _ in range(2):
        assert root(tmp_path).completed == 2
        lines = read_journal(tmp_path / "metrics.jsonl")
        assert [(line["round"], line["weights"]) for line in lines] == [(1, {"a": 1.0}), (2, {"a": 1.0, "b": 1.0})]


def test_after_the_last_round_there_is_none(tmp_path: Path) -> None:
    planner = root(tmp_path)
    for number in (1, 2):
        assert not planner.over
        planner.conclude(number, collected(a=1.0))
    assert planner.over
    assert planner.next({"a"}).round == 0


class Parent:
    """Keeps what an edge asks and sends; the updates of a round can be lost."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.loses = False

    def handle(self, peer: str, request: Message) -> Answer:
        self.seen.append(request)
        if isinstance(request, pb.Ready):
            return answered(pb.Plan(round=1, completed=request.completed))
        if self.loses:
            raise RoundLostError("gone on", remedy="ask")
        return answered(pb.Accepted())


@pytest.fixture
def parent() -> Parent:
    return Parent()


def edge(folder: Path, parent: Parent) -> EdgePlanner:
    return EdgePlanner(RECIPE, ZEROS, RoleDirectory(folder), LoopbackChannel(parent, "left"))


def test_an_edge_passes_on_one_weighted_mean(tmp_path: Path, parent: Parent) -> None:
    planner = edge(tmp_path, parent)
    planner.plan({"b", "a"}).result()
    planner.conclude(1, collected(a=1.0, b=3.0)).result()
    ready, update = parent.seen
    assert list(ready.silos) == ["a", "b"]
    assert (update.round, update.weight) == (1, 2.0)
    assert codec.decode_named(update.tensors, SHAPES)["x"].tolist() == [2.0] * 3
    planner.plan({"a"}).result()
    assert parent.seen[-1].completed == 1


def test_a_round_that_its_parent_lost_is_not_noted(tmp_path: Path, parent: Parent) -> None:
    planner, parent.loses = edge(tmp_path, parent), True
    with pytest.raises(RoundLostError):
        planner.conclude(1, collected(a=1.0)).result()
    planner.plan({"a"}).result()
    assert parent.seen[-1].completed == 0
    assert not read_journal(tmp_path / "metrics.jsonl")


def test_current_adapters_take_part_in_no_round(tmp_path: Path, parent: Parent) -> None:
    planner = root(tmp_path)
    planner.conclude(1, collected(a=1.0, b=3.0))
    current: Any = planner.current().result()
    assert current.completed == planner.next({"a"}).completed == 1
    assert codec.decode_named(current.adapters, SHAPES)["x"].tolist() == [2.0] * 3
    edge = EdgePlanner(RECIPE, ZEROS, RoleDirectory(tmp_path / "edge"), LoopbackChannel(parent, "edge"))
    edge.current()
    assert parent.seen == [pb.Current()]


def test_finished_rounds_belong_to_one_trunk(tmp_path: Path) -> None:
    planner = root(tmp_path)
    for run in ("", "first", "r", ""):  # before a round has finished, the trunk may be replaced
        planner.meet("a", run)
    planner.conclude(1, collected(a=1.0))
    again = root(tmp_path)
    assert again.run == "r"
    again.meet("a", "")
    again.meet("a", "r")
    with pytest.raises(ProtocolError, match="b is connected to the trunk of another run"):
        again.meet("b", "s")
