"""A session: its steps numbered from zero, changes told with the next, and all sent again once if it is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus.errors import UnknownSessionError
from isthmus.recipe import BoundarySection, ReleaseSection
from isthmus.silo.boundary import Boundary
from isthmus.silo.session import RemoteSession
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel, answered
from tests.conftest import outbound

WIDTH = 4


class Trunk:
    """Doubles what comes; loses its sessions when it is told to."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.loses = 0

    def handle(self, peer: str, request: Message) -> Answer:
        kept = type(request)()
        kept.CopyFrom(request)
        self.seen.append(kept)
        if isinstance(request, pb.Close):
            return answered(pb.Closed())
        assert isinstance(request, pb.Decode)
        if self.loses:
            self.loses -= 1
            raise UnknownSessionError("lost", remedy="begin again")
        h_TD = codec.decode(request.hidden, rows=request.hidden.rows, width=WIDTH, codec="fp32")
        return answered(pb.Hidden(hidden=codec.encode(2 * h_TD, "fp32")))


def session(trunk: Trunk, noise: float = 0.0) -> RemoteSession:
    boundary = Boundary(BoundarySection(forward=ReleaseSection(noise=noise)))
    return RemoteSession(LoopbackChannel(trunk, "a"), boundary, 7, WIDTH)


def step(one: RemoteSession, rows: int, value: float = 1.0) -> torch.Tensor:
    return one.step(outbound(one, torch.full((rows, WIDTH), value))).g_TD


def test_steps_are_numbered_and_answered() -> None:
    trunk = Trunk()
    one = session(trunk)
    assert torch.equal(step(one, 3), torch.full((3, WIDTH), 2.0))
    step(one, 1)
    assert [(frame.session, frame.step, list(frame.lengths)) for frame in trunk.seen] == [(7, 0, [3]), (7, 1, [1])]


def test_changes_go_with_the_next_step_and_no_other() -> None:
    trunk = Trunk()
    one = session(trunk)
    step(one, 3)
    one.crop(1)
    one.crop(1)
    one.select([0, 0])
    one.select([1])
    step(one, 1)
    step(one, 1)
    assert [(frame.forget, list(frame.rows)) for frame in trunk.seen] == [(0, []), (2, [0]), (0, [])]


def test_a_lost_session_is_sent_again_as_it_was() -> None:
    trunk = Trunk()
    one = session(trunk, noise=0.5)
    step(one, 2)
    trunk.loses = 1
    step(one, 1)
    first, lost, *again = trunk.seen
    assert again == [first, lost]


def test_one_that_is_lost_again_and_again_is_given_up() -> None:
    trunk = Trunk()
    one = session(trunk)
    trunk.loses = 10**6
    with pytest.raises(UnknownSessionError):
        step(one, 1)


def test_closing_frees_it_on_the_trunk() -> None:
    trunk = Trunk()
    session(trunk).close()
    assert trunk.seen == [pb.Close(session=7)]
