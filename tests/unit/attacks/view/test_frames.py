"""Frames as a view reads them: sequences with answers and gradients, sessions with what was taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus.attacks.view.frames import crossings_of, matrix_of, updates_of
from isthmus.attacks.view.tap import Exchange
from isthmus.errors import FrameError
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import answered

WIDTH = 4


def matrix(*values: float) -> pb.Matrix:
    return codec.encode(torch.tensor(values).unsqueeze(1).expand(-1, WIDTH).contiguous(), "fp32")


def exchange(request: Message, answer: Message | None = None) -> Exchange:
    return Exchange(type(request), request.SerializeToString(), answered(answer or pb.Accepted()))


def first(tensor: Any) -> list[float]:
    return [round(float(value), 3) for value in tensor[:, 0]]


def test_a_training_step_is_read_with_what_came_back() -> None:
    found = crossings_of(
        "a",
        [
            exchange(pb.Begin(round=3)),
            exchange(
                pb.Forward(step=1, lengths=[1, 2], hidden=matrix(1, 2, 3), train=True),
                pb.Hidden(hidden=matrix(10, 20, 30)),
            ),
            exchange(pb.Backward(step=1, gradient=matrix(4, 5, 6), reply=True), pb.Gradient(gradient=matrix(7, 8, 9))),
            exchange(pb.Commit(round=3, step=1, weight=12.0)),
        ],
    )
    assert [(one.kind, one.round, one.weight, one.length) for one in found] == [
        ("train", 3, 12.0, 1),
        ("train", 3, 12.0, 2),
    ]
    second = found[1]
    assert first(second.hidden_LD) == [2, 3]
    assert first(second.answered_LD) == [20, 30]
    assert first(second.gradient_LD) == [5, 6]
    assert first(second.returned_LD) == [8, 9]


def test_a_session_is_what_stands_and_what_was_taken_back() -> None:
    (found,) = crossings_of(
        "a",
        [
            exchange(pb.Decode(session=5, step=0, lengths=[2], hidden=matrix(1, 2)), pb.Hidden(hidden=matrix(10, 20))),
            exchange(
                pb.Decode(session=5, step=1, lengths=[1], hidden=matrix(3), forget=1), pb.Hidden(hidden=matrix(30))
            ),
        ],
    )
    assert (found.kind, first(found.hidden_LD), first(found.answered_LD)) == ("inference", [1, 3], [10, 30])
    assert first(found.forgotten_LD) == [2]


def test_updates_are_read_by_name() -> None:
    update = pb.Update(round=2, weight=3.0, tensors=codec.encode_named({"x": torch.ones(2)}))
    (found,) = updates_of("a", [exchange(update), exchange(pb.Ping(), pb.Pong())])
    assert (found.sender, found.round, found.weight, found.tensors["x"].tolist()) == ("a", 2, 3.0, [1.0, 1.0])


def test_bytes_that_no_codec_wrote_are_refused() -> None:
    bad = matrix(1, 2)
    bad.data = bad.data[:-1]
    with pytest.raises(FrameError):
        matrix_of(bad)
