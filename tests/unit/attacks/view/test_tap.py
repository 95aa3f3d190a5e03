"""The tap: every frame that passes is kept as it left, answers and errors too, and nothing is changed."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message

from isthmus.attacks.view.tap import Tap
from isthmus.errors import ProtocolError
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel, answered


class Service:
    def handle(self, peer: str, request: Message) -> Answer:
        if isinstance(request, pb.Ping):
            return answered(pb.Pong())
        raise ProtocolError("no", remedy="none")


def test_a_request_is_kept_as_it_left() -> None:
    tap = Tap(LoopbackChannel(Service(), "a"))
    begin = pb.Begin(round=1, participants=["a"])
    with pytest.raises(ProtocolError):
        tap.call(begin)
    begin.round = 9
    (kept,) = tap.exchanges
    assert (kept.kind, kept.request) == (pb.Begin, pb.Begin(round=1, participants=["a"]))
    assert kept.response is None


def test_the_channel_behind_it_counts() -> None:
    channel = LoopbackChannel(Service(), "a")
    tap = Tap(channel)
    assert tap.call(pb.Ping()) == pb.Pong()
    assert tap.exchanges[0].response == pb.Pong()
    assert (tap.sent_bytes, tap.received_bytes) == (channel.sent_bytes, channel.received_bytes)
    tap.sent_bytes = 0
    assert channel.sent_bytes == 0
