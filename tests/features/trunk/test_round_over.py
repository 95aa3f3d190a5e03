"""A round that is over takes no more steps, whoever comes late with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.errors import OutOfOrderError, RoundLostError
from isthmus.trunk.sync_steps import Arrival
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer
from tests.unit.trunk.drill import Drill, recipe_of, results
from tests.unit.trunk.talk import WAIT

WORK = (1, (3, 5))


@pytest.mark.parametrize("mode", ["shared", "replica"])
def test_commits_after_the_last_step_change_nothing(mode: str, model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(model, silos=("a", "b"), train={"steps": 1}, adapter=mode, gather=0.0)
    drill = Drill(recipe, tmp_path)
    a, b = (drill.silos[name] for name in "ab")
    drill.begin(names=("a", "b"))
    a.work(WORK)
    b.work(WORK)
    results([a.commit(1, 2.0), b.commit(1, 2.0)])
    finished = drill.adapter()
    a.work(WORK)
    with pytest.raises(RoundLostError):
        a.commit(2, 2.0).result(WAIT)
    assert all(torch.equal(tensor, finished[name]) for name, tensor in drill.adapter().items())
    drill.service.stop()


def test_more_steps_than_a_round_has(model: Path, tmp_path: Path) -> None:
    """While another silo is still at work."""
    recipe = recipe_of(model, silos=("a", "b"), train={"steps": 1}, patience=0.05, gather=0.0)
    drill = Drill(recipe, tmp_path)
    a = drill.silos["a"]
    drill.begin(names=("a", "b"))
    drill.service._steps._commits.expect(("a",))
    drill.service._steps._done["b"] = -1  # far behind
    drill.service._steps._done["a"] = 1
    with pytest.raises(OutOfOrderError, match="a round has 1"):
        a.commit(2, 2.0).result(WAIT)
    drill.service.stop()


def test_a_commit_that_the_rounds_end_overtakes(model: Path, tmp_path: Path) -> None:
    """It was let in, and at the barrier the round is another: no step, and no state is saved."""
    recipe = recipe_of(model, silos=("a", "b"), train={"steps": 1}, gather=0.0)
    drill = Drill(recipe, tmp_path)
    a, b = (drill.silos[name] for name in "ab")
    drill.begin(names=("a", "b"))
    results([a.commit(1, 0.0), b.commit(1, 0.0)])
    before, rounds = drill.adapter(), drill.directory.load_round(0)
    a.work(WORK)
    late: Answer = Answer()
    drill.service._steps._commits.arrive("a", Arrival(pb.Commit(round=1, step=1, weight=2.0), late))
    with pytest.raises(RoundLostError):
        late.result(WAIT)
    drill.service._scheduler.submit(lambda: None).result(WAIT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in drill.adapter().items())
    again = drill.directory.load_round(0)["adapter"]
    assert all(torch.equal(tensor, again[name]) for name, tensor in rounds["adapter"].items())
    drill.service.stop()
