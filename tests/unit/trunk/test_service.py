"""The trunk's service: who is greeted, what is answered, and that a new process of a silo finds nothing open."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus.errors import MismatchError, ProtocolError, UnknownSessionError
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
