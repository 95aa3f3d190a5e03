"""The trunk's service: who is greeted, what is answered, and that a new process of a silo finds nothing open."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from isthmus.errors import MismatchError, ProtocolError, RunError, UnknownSessionError
from isthmus.model.checkpoint import Checkpoint
from isthmus.silo.join import greeting
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from tests.unit.trunk.talk import WAIT, WIDTH, Build, Trunk


@pytest.fixture
def trunk(build: Build) -> Trunk:
    return build()


def hello(trunk: Trunk, **changed: Any) -> pb.Hello:
    found = greeting(Checkpoint(trunk.recipe.model.path), trunk.recipe)
    for key, value in changed.items():
        setattr(found, key, value)
    return found


def decode(number: int = 0, rows: int = 2) -> pb.Decode:
    return pb.Decode(session=1, step=number, lengths=[rows], hidden=codec.encode(torch.ones(rows, WIDTH), "fp32"))


def test_a_silo_is_greeted_before_anything_else(trunk: Trunk) -> None:
    service: TrunkService = trunk.service
    assert service.handle("a", pb.Ping()).result(WAIT) == pb.Pong()
    with pytest.raises(ProtocolError, match="before Hello"):
        service.handle("a", decode())
    welcome: Any = service.handle("a", hello(trunk)).result(WAIT)
    assert (welcome.completed, welcome.training, len(welcome.run)) == (0, False, 16)
    assert service.handle("a", decode()).result(WAIT).hidden.rows == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changed", "told"), [({"fingerprint": "0" * 64}, "different base models"), ({"bottom": 2}, "cuts at")]
)
def test_another_model_or_cut_is_refused(trunk: Trunk, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(MismatchError, match=told):
        trunk.service.handle("a", hello(trunk, **changed))


def test_what_belongs_to_the_root_is_refused(trunk: Trunk) -> None:
    trunk.service.handle("a", hello(trunk)).result(WAIT)
    with pytest.raises(ProtocolError, match="does not answer Update"):
        trunk.service.handle("a", pb.Update())


def test_a_new_process_finds_nothing_open_and_the_same_one_everything(trunk: Trunk) -> None:
    first = hello(trunk)
    for greeted in (first, first):
        trunk.service.handle("a", greeted).result(WAIT)
    trunk.service.handle("a", decode()).result(WAIT)
    trunk.service.handle("a", first).result(WAIT)
    trunk.service.handle("a", decode(1, rows=1)).result(WAIT)
    trunk.service.handle("a", hello(trunk)).result(WAIT)
    with pytest.raises(UnknownSessionError):
        trunk.service.handle("a", decode(2, rows=1)).result(WAIT)


def test_who_infers_with_a_rounds_ends_is_not_answered_by_another_rounds_trunk(trunk: Trunk) -> None:
    """Until it begins a round itself; others are not concerned."""
    service: TrunkService = trunk.service
    service.handle("a", hello(trunk, ends=0)).result(WAIT)
    service.handle("b", hello(trunk)).result(WAIT)
    service.handle("a", decode()).result(WAIT)
    service._training._round = None  # as after a step of b's
    service._training.changes += 1
    for request in (decode(1), pb.Forward(step=1, lengths=[2], hidden=decode().hidden)):
        with pytest.raises(RunError, match="a has the adapters of round 0, the trunk has trained since") as refused:
            service.handle("a", request)
        assert refused.value.remedy
    with pytest.raises(RunError, match="the trunk has trained since"):
        service.handle("a", hello(trunk, ends=0))
    service.handle("b", decode()).result(WAIT)
    service._training._round = 0
    with pytest.raises(RunError, match="adapters of round 3"):
        service.handle("a", hello(trunk, ends=3))
    service.handle("a", hello(trunk, ends=0)).result(WAIT)
    service.handle("a", pb.Begin(round=1, participants=["a"])).result(WAIT)
    service._training._round = None
    service.handle("a", pb.Forward(step=1, lengths=[2], hidden=decode().hidden)).result(WAIT)


def test_an_answer_during_which_the_trunk_trained_is_none(trunk: Trunk) -> None:
    service: TrunkService = trunk.service
    service.handle("a", hello(trunk, ends=0)).result(WAIT)
    hold = threading.Event()
    service._scheduler.submit(lambda: hold.wait(WAIT))
    answer = service.handle("a", decode())
    service._training.changes += 1
    hold.set()
    with pytest.raises(RunError, match="trained while it answered a"):
        answer.result(WAIT)


def test_a_greeting_that_is_compared_alone_leaves_the_silos_process_as_it_is(trunk: Trunk) -> None:
    service = trunk.service
    forward = pb.Forward(step=1, lengths=[2], hidden=codec.encode(torch.ones(2, WIDTH), "fp32"))
    with pytest.raises(ProtocolError, match="before Hello"):
        service.handle("a", forward)
    service.handle("a", hello(trunk)).result(WAIT)
    service.handle("a", decode()).result(WAIT)
    pong: Any = service.handle("a", pb.Ping(compared=hello(trunk))).result(WAIT)
    assert (pong.welcome.completed, pong.welcome.training, len(pong.welcome.run)) == (0, False, 16)
    assert abs(pong.time - time.time()) < WAIT
    service.handle("a", decode(1, rows=1)).result(WAIT)
    with pytest.raises(MismatchError, match="different base models"):
        service.handle("a", pb.Ping(compared=hello(trunk, fingerprint="0" * 64)))
    service.handle("a", decode(2, rows=1)).result(WAIT)


def test_who_was_compared_alone_may_ask_for_forwards_that_change_nothing(trunk: Trunk) -> None:
    service = trunk.service
    service.handle("a", pb.Ping(compared=hello(trunk))).result(WAIT)
    allowed = pb.Forward(step=1, lengths=[2], hidden=codec.encode(torch.ones(2, WIDTH), "fp32"))
    assert service.handle("a", allowed).result(WAIT).hidden.rows == 2  # type: ignore[attr-defined]
    trains, kept = pb.Forward(), pb.Forward(step=1, lengths=[2], examples=[7])
    trains.CopyFrom(allowed)
    trains.train = True
    for refused in (trains, kept, decode(), pb.Begin(round=1, participants=["a"]), pb.Commit(round=1, step=1)):
        with pytest.raises(ProtocolError, match="before Hello"):
            service.handle("a", refused)
