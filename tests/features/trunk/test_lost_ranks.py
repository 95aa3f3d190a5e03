"""A rank that dies or stands still in the middle of a pass: the trunk names it, answers nothing, and does not hang."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isthmus.errors import RankLostError
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import greeting
from isthmus.storage.record import RoleDirectory
from isthmus.trunk import ranks
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel
from tests.conftest import make_recipe
from tests.unit.trunk.ranks import Others, started
from tests.unit.trunk.talk import SOON, WAIT, WIDTH

pytestmark = pytest.mark.process


@pytest.fixture
def others(tmp_path: Path) -> Iterator[Others]:
    with started(3, tmp_path) as found:
        yield found


class Trunk:
    """A trunk over ranks, and a silo's channel to it."""

    def __init__(self, others: Others, model: Path, folder: Path) -> None:
        recipe = make_recipe(model)
        self.service = TrunkService(recipe, RoleDirectory(folder), ranks=others.use(recipe))
        hello = greeting(Checkpoint(str(model)), recipe)
        self._channel = LoopbackChannel(self.service, "a", greeting=hello)

    def ask(self) -> Answer:
        """A training pass."""
        hidden = codec.encode(torch.randn(7, WIDTH), "fp32")
        return self._channel.submit(pb.Forward(step=1, lengths=[7], hidden=hidden))


def lost(others: Others) -> RankLostError:
    """The error about a rank, as the trunk's main thread finds it."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        try:
            others.ranks.check()
        except RankLostError as error:
            return error
        time.sleep(0.01)
    raise AssertionError("no rank is missed")


def assert_over(trunk: Trunk, answer: Answer) -> None:
    trunk.service.stop()
    vitals = trunk.service.vitals()
    assert (vitals.state, vitals.failure) == ("failed", "the trunk's compute thread has ended")
    assert not answer.done(), "the silo sends it again to the trunk that comes next"


def test_a_rank_that_dies_is_named(others: Others, model: Path, tmp_path: Path) -> None:
    trunk = Trunk(others, model, tmp_path / "trunk")
    trunk.ask().result(WAIT)
    others.processes[1].kill()
    others.processes[1].wait(WAIT)
    answer = trunk.ask()
    error = lost(others)
    assert error.message == "rank 2, which holds some of the trunk's blocks, is gone"
    assert "start all ranks again" in error.remedy
    assert_over(trunk, answer)


def test_a_rank_that_stands_still_is_named(
    others: Others, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "PASS_SECONDS", SOON)
    trunk = Trunk(others, model, tmp_path / "trunk")
    others.processes[0].suspend()
    answer = trunk.ask()
    assert "rank 1, " in lost(others).message
    assert "does not answer" in lost(others).message
    assert_over(trunk, answer)


def test_a_rank_that_dies_while_nobody_asks_is_named_at_the_end(others: Others, model: Path, tmp_path: Path) -> None:
    trunk = Trunk(others, model, tmp_path / "trunk")
    others.processes[0].send_signal(signal.SIGKILL)
    others.processes[0].wait(WAIT)
    others.ranks.check()
    trunk.service.stop()
    others.ranks.end()
    assert "rank 1, " in lost(others).message


def test_a_rank_that_cannot_load_is_named(others: Others, model: Path, tmp_path: Path) -> None:
    """A trunk that cannot start says so to who starts it."""
    absent = make_recipe(model).model_dump(mode="json", exclude_none=True)
    others.use(Recipe.of({**absent, "model": {**absent["model"], "path": str(tmp_path / "absent")}}))
    with pytest.raises(RankLostError, match="rank 1, "):
        TrunkService(make_recipe(model), RoleDirectory(tmp_path / "trunk"), ranks=others.ranks)


def test_the_others_end_when_rank_0_does_without_a_word(model: Path, tmp_path: Path) -> None:
    with started(3, tmp_path) as others:
        recipe = make_recipe(model)
        TrunkService(recipe, RoleDirectory(tmp_path / "trunk"), ranks=others.use(recipe)).stop()
        others.ranks.end = lambda: None  # type: ignore[method-assign]
    assert [process.wait(WAIT) for process in others.processes] == [1, 1]


def test_the_others_end_when_rank_0_says_so(model: Path, tmp_path: Path) -> None:
    with started(3, tmp_path) as others:
        recipe = make_recipe(model)
        TrunkService(recipe, RoleDirectory(tmp_path / "trunk"), ranks=others.use(recipe)).stop()
    assert [process.wait(WAIT) for process in others.processes] == [0, 0]
