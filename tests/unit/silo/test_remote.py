"""The trunk behind a channel: training steps numbered, gradients that cross only where wanted, rounds it can lose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus.errors import FrameError, RoundLostError
from isthmus.model.crossing import Outbound
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import BoundarySection, ReleaseSection
from isthmus.silo.boundary import Boundary
from isthmus.silo.remote import RemoteTrunk
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel, answered

WIDTH = 4
QUIET = {path: ReleaseSection(noise=0.0) for path in ("forward", "gradient", "update")}


class Trunk:
    """Doubles hidden states and triples gradients."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.lost = False

    def handle(self, peer: str, request: Message) -> Answer:
        kept = type(request)()
        kept.CopyFrom(request)
        self.seen.append(kept)
        if isinstance(request, pb.Forward):
            return answered(pb.Hidden(hidden=_times(2, request.hidden)))
        if isinstance(request, pb.Backward):
            return answered(pb.Gradient(gradient=_times(3, request.gradient) if request.reply else None))
        if self.lost:
            raise RoundLostError("gone on", remedy="ask")
        return answered(pb.Begun() if isinstance(request, pb.Begin) else pb.Stepped(contributors=2))


def _times(factor: float, matrix: pb.Matrix) -> pb.Matrix:
    return codec.encode(factor * codec.decode(matrix, rows=matrix.rows, width=WIDTH, codec="fp32"), "fp32")


def remote(trunk: Trunk, **options: Any) -> RemoteTrunk:
    return RemoteTrunk(LoopbackChannel(trunk, "a"), Boundary(BoundarySection(**QUIET)), WIDTH, **options)


def batch(h_TW: torch.Tensor) -> Outbound:
    return Outbound([len(h_TW)], h_TW, Subjects(("r",), (len(h_TW),)))


def test_a_training_step_goes_there_and_back() -> None:
    trunk = Trunk()
    h_TW = torch.ones(3, WIDTH, requires_grad=True)
    output = remote(trunk)(batch(h_TW)).g_TD
    assert torch.equal(output.detach(), torch.full((3, WIDTH), 2.0))
    output.sum().backward()
    assert h_TW.grad is not None
    assert torch.equal(h_TW.grad, torch.full((3, WIDTH), 3.0))
    forward, backward = trunk.seen
    assert (forward.step, forward.train, backward.step, backward.reply) == (1, True, 1, True)


def test_a_frozen_bottom_wants_no_gradient_but_the_trunk_does() -> None:
    trunk = Trunk()
    remote(trunk)(batch(torch.ones(1, WIDTH))).g_TD.sum().backward()
    assert not trunk.seen[-1].reply


def test_without_gradients_or_under_no_grad_nothing_is_trained() -> None:
    trunk = Trunk()
    h_TW = torch.ones(1, WIDTH, requires_grad=True)
    assert not remote(trunk, gradients=False)(batch(h_TW)).g_TD.requires_grad
    with torch.no_grad():
        remote(trunk)(batch(h_TW))
    assert [frame.train for frame in trunk.seen] == [False, False]


def test_an_ascent_pass_is_told_as_one() -> None:
    trunk = Trunk()
    one = remote(trunk)
    with one.ascent_pass():
        one(batch(torch.ones(1, WIDTH, requires_grad=True))).g_TD.sum().backward()
    one(batch(torch.ones(1, WIDTH, requires_grad=True))).g_TD.sum().backward()
    assert [frame.ascent_pass for frame in trunk.seen if isinstance(frame, pb.Backward)] == [True, False]


def test_rounds_begin_and_commit_and_can_be_lost() -> None:
    trunk = Trunk()
    rounds = remote(trunk).rounds
    rounds.begin(2, ["a", "b"])
    assert rounds.commit(2, 1, 5.0) == 2
    assert [type(frame) for frame in trunk.seen] == [pb.Begin, pb.Commit]
    trunk.lost = True
    with pytest.raises(RoundLostError):
        rounds.commit(2, 2, 5.0)


def test_an_answer_of_another_shape_is_refused() -> None:
    class Short(Trunk):
        def handle(self, peer: str, request: Message) -> Answer:
            return answered(pb.Hidden(hidden=codec.encode(torch.ones(1, WIDTH), "fp32")))

    with pytest.raises(FrameError), torch.no_grad():
        remote(Short())(batch(torch.ones(2, WIDTH)))
