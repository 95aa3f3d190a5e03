"""A step in micro-batches has the gradients of the step in one piece."""

from __future__ import annotations

import pytest
import torch
from google.protobuf.message import Message

from isthmus.data.tokens import Batch
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import train_step
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel
from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import FAMILIES, Twins, assert_same, batch_of, ragged

LENGTHS = (3, 40, 23, 11, 30)


class Order:
    """A channel that notes the kinds of request in the order they were sent."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.sent: list[str] = []

    def submit(self, request: Message) -> Answer:
        self.sent.append(type(request).__name__)
        return self._channel.submit(request)

    def call(self, request: Message) -> object:
        return self.submit(request).result()

    def close(self) -> None:
        self._channel.close()


def batch() -> Batch:
    return batch_of(ragged("left", lengths=LENGTHS))


def gradients(twins: Twins, micro_batches: int | None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and all gradients of one step, whose optimizer changes nothing; None: in one piece."""
    twins.service._training.forget("a")
    optimizer = torch.optim.SGD([p for p in twins.split.parameters() if p.requires_grad], lr=0.0)
    if micro_batches is None:
        step = train_step(twins.split, optimizer, batch())
    else:
        step = pipelined_step(twins.split, optimizer, batch(), micro_batches)
    assert step.weight == batch().supervised
    return step.loss, {name: tensor.clone() for name, tensor in twins.split_gradients().items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 5, 9])
def test_gradients_equal_those_of_the_whole_batch(family: str, micro_batches: int, twins_of: BuildTwins) -> None:
    twins = twins_of(family, (1, 2), ends_train_a=True)
    loss, whole = gradients(twins, None)
    pipelined_loss, pipelined = gradients(twins, micro_batches)
    assert pipelined_loss == pytest.approx(loss, rel=1e-5)
    assert_same(pipelined, whole, 1e-5)


def test_all_forwards_are_sent_before_the_first_answer_is_needed(twins_of: BuildTwins) -> None:
    twins = twins_of("llama", (1, 1))
    twins.remote.channel = order = Order(twins.remote.channel)  # type: ignore[assignment]
    gradients(twins, 3)
    assert order.sent == ["Forward"] * 3 + ["Backward"] * 3


def test_a_frozen_bottom_wants_no_gradient_back(twins_of: BuildTwins) -> None:
    twins = twins_of("llama", (1, 1))
    twins.split.bottom.requires_grad_(False)
    asked: list[bool] = []
    submit = twins.remote.channel.submit
    twins.remote.channel.submit = lambda request: (  # type: ignore[method-assign]
        asked.append(request.reply) if isinstance(request, pb.Backward) else None,
        submit(request),
    )[1]
    optimizer = torch.optim.SGD(twins.split.top.parameters(), lr=0.0)
    pipelined_step(twins.split, optimizer, batch(), 2)
    assert asked == [False, False]
