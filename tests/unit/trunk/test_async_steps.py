"""The trunk's optimizer steps where silos wait for nobody, against the same slow oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from isthmus.errors import OutOfOrderError, ProtocolError, RoundLostError, UnknownStepError
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from tests.conftest import make_recipe
from tests.unit.trunk.test_sync_steps import RATE, WAIT, WORK_A, WORK_B, WORK_C, Oracle, Silo, Trunk

Build = Callable[..., Trunk]
ALONE = {"a": ("a",), "b": ("b",)}


@pytest.fixture
def build(model: Path, tmp_path: Path) -> Iterator[Build]:
    built: list[Trunk] = []

    def trunk(*, rounds: int = 3, steps: int = 2) -> Trunk:
        recipe = make_recipe(
            model,
            silos=("a", "b"),
            federation={"asynchronous": {"buffer": 1}},
            train={"rounds": rounds, "steps": steps, "optimizer": "sgd", "learning_rate": RATE, "evaluate": False},
            trunk={"gather": WAIT},  # who waits for another here waits too long
        )
        built.append(Trunk(recipe, RunDirectory(tmp_path / "run").role("trunk")))
        return built[-1]

    yield trunk
    for one in built:
        one.service.stop()


def begin(silo: Silo, name: str, round: int = 1) -> None:
    silo.begin(round, ALONE[name]).result(WAIT)


def test_each_steps_at_once_by_itself(build: Build) -> None:
    trunk = build()
    oracle, a, b = Oracle(trunk), Silo(trunk, "a"), Silo(trunk, "b")
    begin(a, "a")
    for step, work in enumerate((WORK_A, WORK_B), 1):
        a.work(work)
        assert a.commit(step, weight=sum(work[1])).result(WAIT).contributors == 1  # type: ignore[attr-defined]
        oracle.step((1.0, oracle.gradients(work)))
    begin(b, "b")
    b.work(WORK_C)
    b.commit(1, weight=0.5).result(WAIT)  # alone, its weight is all there is
    oracle.step((1.0, oracle.gradients(WORK_C)))
    oracle.agrees(trunk)
    lines = read_journal(trunk.directory.path / "metrics.jsonl")
    assert lines == [
        {"round": 1, "step": 1, "silos": ["a"]},
        {"round": 1, "step": 2, "silos": ["a"]},
        {"round": 1, "step": 1, "silos": ["b"]},
    ]


def test_a_backward_is_through_the_adapter_as_it_is(build: Build) -> None:
    trunk = build()
    oracle, a, b = Oracle(trunk), Silo(trunk, "a"), Silo(trunk, "b")
    begin(a, "a")
    begin(b, "b")
    slow = b.forward(WORK_B)
    a.work(WORK_A)
    a.commit(1, weight=8).result(WAIT)
    oracle.step((1.0, oracle.gradients(WORK_A)))
    b.backward(slow, WORK_B)
    b.commit(1, weight=4).result(WAIT)
    oracle.step((1.0, oracle.gradients(WORK_B)))
    oracle.agrees(trunk)


def test_a_silo_that_begins_again_leaves_nothing_of_its_own_and_all_of_the_others(build: Build) -> None:
    trunk = build()
    oracle, a, b = Oracle(trunk), Silo(trunk, "a"), Silo(trunk, "b")
    begin(a, "a")
    begin(b, "b")
    a.work(WORK_C)
    lost = a.forward(WORK_C)
    b.work(WORK_B)
    before = oracle.gradients(WORK_B)
    begin(a, "a", 2)
    with pytest.raises(UnknownStepError):
        a.backward(lost, WORK_C)
    a.work(WORK_A)
    a.commit(1, weight=8, round=2).result(WAIT)
    oracle.step((1.0, oracle.gradients(WORK_A)))
    b.commit(1, weight=4).result(WAIT)
    oracle.step((1.0, before))
    oracle.agrees(trunk)


def test_the_state_of_a_version_is_that_at_its_first_begin(build: Build) -> None:
    trunk = build()
    a, b = Silo(trunk, "a"), Silo(trunk, "b")
    begin(a, "a")
    a.work(WORK_A)
    a.commit(1, weight=8).result(WAIT)
    begin(b, "b", 2)
    then = trunk.adapter()
    b.work(WORK_B)
    b.commit(1, weight=4, round=2).result(WAIT)
    begin(a, "a", 2)
    begin(a, "a", 1)  # an old version again, of a root that lost the newest: nothing is kept of it
    assert trunk.directory.rounds() == {0, 1}
    kept = trunk.directory.load_round(1)["adapter"]
    assert all(torch.equal(kept[name], tensor) for name, tensor in then.items())
    assert any(not torch.equal(kept[name], tensor) for name, tensor in trunk.adapter().items())
    again = build()
    assert all(torch.equal(again.adapter()[name], tensor) for name, tensor in then.items())
    with pytest.raises(RoundLostError):  # it knows nobody: silos ask for the plan again
        Silo(again, "a").commit(2, weight=8, round=1).result(WAIT)


def test_after_the_last_version_nobody_steps(build: Build) -> None:
    trunk = build(rounds=2)
    a, b = Silo(trunk, "a"), Silo(trunk, "b")
    begin(a, "a", 2)
    begin(b, "b", 2)
    a.work(WORK_A)
    a.commit(1, weight=8, round=2).result(WAIT)
    begin(a, "a", 3)
    then = trunk.adapter()
    b.work(WORK_B)
    with pytest.raises(RoundLostError):
        b.commit(1, weight=4, round=2).result(WAIT)
    with pytest.raises(RoundLostError):
        a.commit(1, weight=4, round=3).result(WAIT)
    assert trunk.directory.last_round() == 2
    kept = trunk.directory.load_round(2)["adapter"]
    assert all(torch.equal(kept[name], tensor) for name, tensor in then.items())


def test_out_of_order(build: Build) -> None:
    trunk = build(steps=1)
    a = Silo(trunk, "a")
    with pytest.raises(RoundLostError):
        a.commit(1, weight=1).result(WAIT)
    with pytest.raises(ProtocolError, match="does not take part"):
        a.begin(1, ("b",)).result(WAIT)
    begin(a, "a")
    for step, error in ((2, OutOfOrderError), (1, None), (1, OutOfOrderError), (2, OutOfOrderError)):
        if error is None:
            a.commit(step, weight=0).result(WAIT)
            continue
        with pytest.raises(error):
            a.commit(step, weight=1).result(WAIT)
    with pytest.raises(RoundLostError):
        a.commit(1, weight=1, round=2).result(WAIT)
