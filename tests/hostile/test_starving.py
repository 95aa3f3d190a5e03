"""One silo that sends more than its part of everything: the others' requests wait for one turn of it, not for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import ProtocolError
from isthmus.trunk import scheduler, service
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer
from tests.conftest import make_recipe, save_tiny_model
from tests.unit.trunk.talk import ONE, WAIT, WIDTH, Silo, Trunk, decoded, prompt

FLOOD = 60
NAMES = ("good", "greedy", "third")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def trunk(model: Path, tmp_path: Path) -> Iterator[Trunk]:
    made = Trunk(make_recipe(model, silos=NAMES, trunk={"chunk": 16}), tmp_path)
    yield made
    made.service.stop()


@pytest.fixture
def order(trunk: Trunk) -> list[str]:
    """The silos of the answers, in the order in which the trunk gives them."""
    return []


def frame(rows: int = 8) -> pb.Matrix:
    return codec.encode(torch.ones(rows, WIDTH), "fp32")


def evaluations(silo: Silo) -> list[Answer]:
    request = pb.Forward(step=1, lengths=[8], hidden=frame())
    return [silo.channel.submit(request) for _ in range(FLOOD)]


def forwards(silo: Silo) -> list[Answer]:
    return [
        silo.channel.submit(pb.Forward(step=step, lengths=[8], hidden=frame(), train=True))
        for step in range(1, FLOOD + 1)
    ]


def prompts(silo: Silo) -> list[Answer]:
    return [silo.send(number, 0, prompt(50)) for number in range(FLOOD)]


def beginnings(silo: Silo) -> list[Answer]:
    """And everything else that has the trunk change its state: each ends an open round, or fails."""
    asked: list[Any] = [pb.Begin(open=True, participants=["greedy"]), pb.End(round=1)]
    return [silo.channel.submit(one) for _ in range(FLOOD // 2) for one in asked]


def token(silo: Silo) -> Answer:
    return silo.send(1, 1, ONE)


def evaluation(silo: Silo) -> Answer:
    return silo.channel.submit(pb.Forward(step=1, lengths=[8], hidden=frame()))


def training(silo: Silo) -> Answer:
    return silo.channel.submit(pb.Forward(step=1, lengths=[8], hidden=frame(), train=True))


@pytest.mark.parametrize("wanted", [token, evaluation, training])
@pytest.mark.parametrize("flood", [evaluations, forwards, prompts, beginnings])
def test_a_request_waits_for_one_turn_of_each_other_silo(
    flood: Callable[[Silo], list[Answer]], wanted: Callable[[Silo], Answer], trunk: Trunk, order: list[str]
) -> None:
    good, greedy, third = (trunk.silo(name) for name in NAMES)
    decoded(good.send(1, 0, prompt(3)))
    turns = count_turns(trunk)
    with trunk.held():
        answers = flood(greedy) + flood(third)
        mine = wanted(good)
        mine.add_done_callback(lambda _: order.extend(turns))
    assert decoded(mine).isfinite().all()
    assert order.count("greedy") <= 2, "one before, and one together with it"
    assert order.count("third") <= 2
    for answer in answers:
        answer.exception(WAIT)
    assert not trunk.service._scheduler.waiting
    assert not trunk.service._scheduler.waiting_bytes


def test_a_queue_is_bounded_in_requests_and_refused_by_name(trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "QUEUED_JOBS", FLOOD // 2)
    good, greedy = trunk.silo("good"), trunk.silo("greedy")
    with trunk.held():
        answers = evaluations(greedy)
        mine = evaluation(good)
    decoded(mine)
    errors = [answer.exception(WAIT) for answer in answers]
    assert errors[: FLOOD // 2] == [None] * (FLOOD // 2)
    for error in errors[FLOOD // 2 :]:
        assert isinstance(error, ProtocolError)
        assert f"{FLOOD // 2} requests of greedy" in error.message
        assert error.remedy == "wait for answers before sending more"
    decoded(evaluation(greedy))


def test_a_queue_is_bounded_in_bytes(model: Path, tmp_path: Path) -> None:
    limit = 20_000
    trunk = Trunk(make_recipe(model, silos=NAMES, wire={"max_frame_bytes": limit}), tmp_path)
    good, greedy = trunk.silo("good"), trunk.silo("greedy")
    request = pb.Forward(step=1, lengths=[100], hidden=frame(100))
    with trunk.held():
        answers = [greedy.channel.submit(request) for _ in range(FLOOD)]
        held = trunk.service._scheduler.waiting_bytes["greedy"]
        mine = good.channel.submit(request)
    decoded(mine)
    assert request.ByteSize() < held <= service.QUEUED_FRAMES * limit
    assert 0 < sum(isinstance(answer.exception(WAIT), ProtocolError) for answer in answers) < FLOOD
    decoded(greedy.channel.submit(request))
    trunk.service.stop()


def test_what_a_process_left_behind_is_dropped_when_another_takes_its_place(trunk: Trunk) -> None:
    greedy = trunk.silo("greedy")
    with trunk.held():
        answers = evaluations(greedy)
        trunk.silo("greedy")
    for answer in answers:
        assert isinstance(answer.exception(WAIT), ProtocolError)
    trunk.service._scheduler.submit(lambda: None).result(WAIT)
    assert not trunk.service._scheduler.waiting


def count_turns(trunk: Trunk) -> list[str]:
    """Grows with each silo that has a part in a turn."""
    turns: list[str] = []
    run = trunk.service._scheduler._run

    def counted(jobs: list[scheduler.Job]) -> None:
        turns.extend({str(job.silo) for job in jobs})
        run(jobs)

    trunk.service._scheduler._run = counted  # type: ignore[method-assign]
    return turns
