"""The loopback channel: the same frames and checks as over the network, and errors that arrive as they were raised."""

from __future__ import annotations

import logging

import pytest
from google.protobuf.message import Message

from isthmus.errors import FrameError, FrameSizeError, IsthmusError, RoundLostError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel, answer_request, answered, check_size, settle


class Echo:
    """Answers a ping, and raises what it was given."""

    def __init__(self, error: Exception | None = None, *, later: bool = False) -> None:
        self.error, self.later = error, later
        self.seen: list[tuple[str, Message]] = []

    def handle(self, peer: str, request: Message) -> Answer:
        self.seen.append((peer, request))
        if self.error is None:
            return answered(pb.Pong())
        if not self.later:
            raise self.error
        answer: Answer = Answer()
        answer.set_exception(self.error)
        return answer


def test_a_request_is_answered_and_its_bytes_are_counted() -> None:
    service = Echo()
    channel = LoopbackChannel(service, "ann", greeting=pb.Ping())
    assert channel.call(pb.Ping()) == pb.Pong()
    assert service.seen == [("ann", pb.Ping())] * 2
    assert channel.sent_bytes == len(frames.wrap(pb.Ping(), id=1).SerializeToString()) * 2
    assert channel.received_bytes > 0


@pytest.mark.parametrize("later", [False, True])
def test_an_error_arrives_with_its_kind_message_and_remedy(later: bool) -> None:
    channel = LoopbackChannel(Echo(RoundLostError("gone", remedy="ask"), later=later), "ann")
    with pytest.raises(RoundLostError) as caught:
        channel.call(pb.Ping())
    assert (caught.value.message, caught.value.remedy) == ("gone", "ask")


def test_an_unknown_failure_is_logged_here_and_only_named_there(caplog: pytest.LogCaptureFixture) -> None:
    channel = LoopbackChannel(Echo(ZeroDivisionError("secret")), "ann")
    with caplog.at_level(logging.ERROR), pytest.raises(IsthmusError, match="ZeroDivisionError") as caught:
        channel.call(pb.Ping())
    assert "secret" not in caught.value.message
    assert "secret" in caplog.text


def test_a_frame_over_the_limit_is_not_sent() -> None:
    service = Echo()
    channel = LoopbackChannel(service, "ann", limit=10)
    with pytest.raises(FrameSizeError, match="the limit is 10"):
        channel.submit(pb.Update(round=1, masked=bytes(100)))
    assert not service.seen
    assert channel.sent_bytes == 0
    check_size(10, 10)


def test_a_malformed_frame_is_refused_before_the_service_sees_it() -> None:
    service, answer = Echo(), Answer()
    served = answer_request(service, "ann", pb.Frame(id=1))
    assert not service.seen
    settle(answer, frames.parse(served.result()), pb.Ping)
    assert isinstance(answer.exception(), FrameError)
    settle(empty := Answer(), pb.Frame(id=1), pb.Ping)
    assert isinstance(empty.exception(), FrameError)
