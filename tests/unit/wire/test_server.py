"""gRPC client and server when the connection breaks, the server goes, or the other side sends rubbish."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from isthmus.errors import FrameError, FrameSizeError, IsthmusError, MismatchError, PeerGoneError
from isthmus.wire import client, frames, server
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer
from isthmus.wire.server import Server
from tests.conformance.test_channels import (
    AUTHORITY,
    HANG,
    LIMIT,
    SILOS,
    TRUNK,
    Echo,
    Late,
    ask,
    echoed,
    joined,
    number,
    serving,
    until,
)
from tests.unit.wire.test_identity import Forwarder, raw_client, raw_server


@contextmanager
def cuttable(service: Echo, **options: Any) -> Iterator[tuple[Any, Forwarder]]:
    """A channel to this service and the forwarder that it goes through."""
    with (
        serving({"Trunk": service}) as server,
        closing(Forwarder(server.port)) as forwarder,
        closing(joined(forwarder.port, **options)) as channel,
    ):
        yield channel, forwarder


def answer_to(data: bytes) -> bytes:
    return frames.wrap(pb.Pong(), id=frames.parse(data).id).SerializeToString()


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as taken:
        return int(taken.getsockname()[1])


def handled(service: Echo) -> list[Message]:
    return [request for request in service.requests if not isinstance(request, pb.Ping)]


def streams(service: Echo) -> int:
    """Streams that greeted this service."""
    return len(service.requests) - len(handled(service))


def test_pending_requests_are_answered_after_a_cut_and_handled_once() -> None:
    service = Late()
    with cuttable(service) as (channel, forwarder):
        answers = [channel.submit(number(value)) for value in range(10)]
        for cut in (1, 2):
            until(lambda: len(service.held) == 10)
            forwarder.cut()
            until(lambda cut=cut: streams(service) == 1 + cut)
        service.answer(reversed)
        assert [answer.result(HANG).completed for answer in answers] == list(range(10))
        assert handled(service) == list(map(number, range(10)))


def test_a_long_silence_does_not_end_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silo computes for minutes between frames; its pings meanwhile must not be taken for a nuisance."""
    slow = ("grpc.keepalive_timeout_ms", "grpc.keepalive_permit_without_calls", "grpc.http2.max_pings_without_data")
    hasty = tuple((name, value if name in slow else value // 100) for name, value in server.KEEPALIVE)
    for module in (server, client):
        monkeypatch.setattr(module, "KEEPALIVE", hasty)
    service = Echo()
    with serving({"Trunk": service}) as trunk, closing(joined(trunk.port)) as channel:
        assert channel.call(number(1)) == number(1)
        time.sleep(4.0)  # twenty pings
        assert channel.call(number(2)) == number(2)
    assert streams(service) == 1


@pytest.mark.parametrize("address", ["localhost:0", "127.0.0.1:0", "[::1]:0"])
def test_a_free_port_is_taken_at_one_address(address: str) -> None:
    with serving({"Trunk": Echo()}, address=address) as server:
        listening = 0
        for host in ("127.0.0.1", "::1"):
            with suppress(OSError), socket.create_connection((host, server.port), HANG):
                listening += 1
    assert listening == 1


def test_a_host_that_nobody_knows_is_named() -> None:
    with (
        pytest.raises(IsthmusError, match=r"cannot listen at nowhere\.invalid:0"),
        serving({}, address="nowhere.invalid:0"),
    ):
        pass


def test_an_answer_given_while_nobody_listens_is_not_lost() -> None:
    service = Late()
    with cuttable(service) as (channel, forwarder):
        answer = channel.submit(number(1))
        until(lambda: service.held)
        forwarder.passing = False
        forwarder.cut()
        unsent = channel.submit(number(2))
        service.answer()
        until(lambda: forwarder.turned_away > 1)
        forwarder.passing = True
        assert answer.result(HANG) == number(1)
        until(lambda: service.held)
        service.answer()
        assert unsent.result(HANG) == number(2)
        assert handled(service) == [number(1), number(2)]


def test_a_frame_cut_in_its_middle_is_sent_again() -> None:
    service = Echo()
    with cuttable(service) as (channel, forwarder):
        forwarder.cut_after(3_000_000)
        bodies = [pb.Gradient(gradient=pb.Matrix(rows=row, data=bytes([row]) * 2**21)) for row in range(4)]
        answers = [channel.submit(body) for body in bodies]
        assert [answer.result(HANG) for answer in answers] == bodies
        assert handled(service) == bodies
        assert streams(service) == 2


def test_many_cuts_lose_and_double_nothing() -> None:
    service = Echo()
    with cuttable(service) as (channel, forwarder):
        answers: list[Answer] = []
        for value in range(200):
            answers.append(channel.submit(number(value)))
            if value % 60 == 30:
                forwarder.cut_after(1 + value)
            time.sleep(0.001)
        assert [answer.result(HANG).completed for answer in answers] == list(range(200))
        assert handled(service) == list(map(number, range(200)))
        assert streams(service) > 1


def test_a_greeting_refused_on_a_later_stream_ends_the_channel() -> None:
    def how(request: Message) -> Answer:
        if streams(service) > 1:
            raise MismatchError("another model now", remedy="take ours")
        return echoed(request) if isinstance(request, pb.Ping) else Answer()

    service = Echo(how)
    with cuttable(service) as (channel, forwarder):
        pending = channel.submit(number(1))
        forwarder.cut()
        with pytest.raises(MismatchError, match="another model now"):
            pending.result(HANG)
        with pytest.raises(MismatchError):
            channel.submit(number(2))


def test_a_server_that_comes_back_answers_what_is_pending() -> None:
    service = Late()
    with serving({"Trunk": service}) as server:
        channel = joined(server.port)
        answers = [channel.submit(number(value)) for value in range(3)]
        until(lambda: len(service.held) == 3)
    service.held.clear()
    with serving({"Trunk": service}, address=f"localhost:{server.port}"), closing(channel):
        until(lambda: len(service.held) == 3)
        service.answer()
        assert [answer.result(HANG).completed for answer in answers] == [0, 1, 2]
        assert handled(service) == [*map(number, range(3))] * 2


def test_a_server_gone_past_the_deadline_fails_everything() -> None:
    service = Late()
    with serving({"Trunk": service}) as server:
        channel = joined(server.port, deadline=0.3)
        pending = [channel.submit(number(value)) for value in range(3)]
        until(lambda: len(service.held) == 3)
    for failed in (*(answer.result for answer in pending), lambda _: channel.submit(number(4))):
        with pytest.raises(PeerGoneError, match=f"localhost:{server.port}") as gone:
            failed(HANG)
        assert gone.value.remedy
    channel.close()


def test_a_server_that_was_never_there() -> None:
    port = free_port()
    with pytest.raises(PeerGoneError, match=f"localhost:{port}") as gone:
        joined(port, deadline=0.3)
    assert gone.value.remedy


def test_another_service_than_wanted() -> None:
    with serving({"Trunk": Echo()}) as server, pytest.raises(PeerGoneError) as gone:
        joined(server.port, service="Root")
    assert "correct the address in the recipe" in gone.value.remedy


def test_frames_are_sent_again_byte_for_byte() -> None:
    seen: list[list[bytes]] = []

    def stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        seen.append([])
        for data in requests:
            seen[-1].append(data)
            if len(seen) > 1 or len(seen[-1]) == 1:
                yield answer_to(data)
            elif len(seen[-1]) == 4:
                context.abort(grpc.StatusCode.UNAVAILABLE, "for a while")

    with raw_server(stream, TRUNK) as port, closing(joined(port)) as channel:
        answers = [channel.submit(number(value)) for value in range(3)]
        assert [answer.result(HANG) for answer in answers] == [pb.Pong()] * 3
    assert len(seen[0]) == 4
    assert seen[0] == seen[1]


@pytest.mark.parametrize("data", [b"\xff rubbish", b""])
def test_a_server_that_answers_rubbish_fails_what_is_pending(data: bytes) -> None:
    def stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        yield answer_to(next(requests))
        next(requests)
        yield data or pb.Frame(id=1).SerializeToString()

    with raw_server(stream, TRUNK) as port, closing(joined(port)) as channel, pytest.raises(FrameError):
        ask(channel, number(1))


def test_a_server_with_a_lower_limit_refuses() -> None:
    with serving({"Trunk": Echo()}, limit=10_000) as server, closing(joined(server.port)) as channel:
        with pytest.raises(FrameSizeError) as refused:
            ask(channel, pb.Gradient(gradient=pb.Matrix(data=bytes(20_000))))
        assert refused.value.remedy


@pytest.mark.parametrize(
    ("messages", "status"),
    [
        ((b"\xff rubbish",), grpc.StatusCode.INVALID_ARGUMENT),
        ((frames.wrap(pb.Ping()).SerializeToString(), b"\x0a"), grpc.StatusCode.INVALID_ARGUMENT),
        ((bytes(20_000),), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_rubbish_ends_its_own_stream_only(messages: tuple[bytes, ...], status: grpc.StatusCode) -> None:
    service, silo = Echo(), AUTHORITY.issue("b").client_credentials()
    with serving({"Trunk": service}, limit=10_000) as server, closing(joined(server.port)) as other:
        assert raw_client(server.port, *messages, credentials=silo) is status
        assert ask(other, number(1)) == number(1)
        assert raw_client(server.port, credentials=silo) is grpc.StatusCode.OK
    assert streams(service) == 1 + len(messages[:-1])


def test_a_client_that_starts_anew_is_served_anew() -> None:
    service = Echo()
    with serving({"Trunk": service}) as server:
        for value in (1, 2):
            with closing(joined(server.port)) as channel:
                assert ask(channel, number(value)) == number(value)
    assert handled(service) == [number(1), number(2)]


def test_thousands_of_requests_may_be_under_way() -> None:
    """A lost session's frames are all sent again at once."""
    service = Late()
    with serving({"Trunk": service}) as server, closing(joined(server.port)) as channel:
        first = channel.submit(number(0))
        until(lambda: service.held)
        service.answer()
        assert first.result(HANG) == number(0)
        answers = [channel.submit(number(value)) for value in range(3000)]
        until(lambda: len(service.held) == 3000)
        service.answer(reversed)
        assert [answer.result(HANG).completed for answer in answers] == list(range(3000))


def test_an_address_that_is_taken() -> None:
    services = {"Trunk": Echo()}
    with serving(services) as server, pytest.raises(IsthmusError, match="cannot listen") as refused:
        Server(services, TRUNK, {"Trunk": SILOS}, f"localhost:{server.port}", LIMIT)
    assert refused.value.remedy
