"""A certified peer that opens streams without end: at most two of them live, and nobody else waits for a thread."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress

import grpc
import pytest

from isthmus.errors import FrameError, ProtocolError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire import server as wire_server
from isthmus.wire.chunks import Assembler
from isthmus.wire.client import GrpcChannel
from isthmus.wire.inbox import MAX_INSTANCES
from isthmus.wire.server import INSTANCE_KEY, METHOD_PATH
from tests.conformance.test_channels import AUTHORITY, HANG, Echo, Late, ask, joined, number, serving, until

STREAMS = 60


class Raw:
    """A stream of a peer with a certificate that sends what it likes, and reads only what ``read`` asks for."""

    def __init__(self, port: int, *, peer: str = "b", instance: str = "i", limit: int = 64 * 2**20) -> None:
        options = (
            ("grpc.ssl_target_name_override", "trunk"),
            ("grpc.use_local_subchannel_pool", 1),  # a connection of its own
            ("grpc.max_receive_message_length", limit + 1024),
            ("grpc.max_send_message_length", limit + 1024),
        )
        self._channel = grpc.secure_channel(f"localhost:{port}", AUTHORITY.issue(peer).client_credentials(), options)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        open_stream = self._channel.stream_stream(METHOD_PATH.format("Trunk"), None, None)
        self.call = open_stream(iter(self._outbox.get, None), metadata=((INSTANCE_KEY, instance),))

    def send(self, body: pb.Message | None = None, *, id: int = 0, acked: int = 0) -> None:  # type: ignore[name-defined]
        self._outbox.put(frames.wrap(body or pb.Ping(), id=id, acked=acked).SerializeToString())

    def read(self) -> pb.Frame:
        received = Assembler(64 * 2**20)
        while (whole := received.add(next(self.call))) is None:
            pass
        return frames.parse(whole)

    @property
    def lives(self) -> bool:
        return bool(self.call.is_active())

    def close(self) -> None:
        self.call.cancel()
        self._outbox.put(None)
        self._channel.close()


def greeted(port: int, **options: str) -> Raw:
    """A stream whose greeting was answered, so that the server has it."""
    raw = Raw(port, **options)  # type: ignore[arg-type]
    raw.send()
    assert raw.read().HasField("pong")
    return raw


def ended(channel: GrpcChannel) -> bool:
    try:
        ask(channel, number(1))
    except ProtocolError:
        return True
    return False


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("instances", [1, STREAMS], ids=["one process", "many processes"])
def test_streams_of_one_certificate_leave_everybody_else_served(instances: int, opened: ExitStack) -> None:
    with serving({"Trunk": Echo()}) as server, closing(joined(server.port)) as good:
        raws = []
        for number_ in range(STREAMS):
            raws.append(opened.enter_context(closing(greeted(server.port, instance=f"i{number_ % instances}"))))
            assert ask(good, number(number_)) == number(number_)
        until(lambda: sum(raw.lives for raw in raws) == min(instances, MAX_INSTANCES))
        assert raws[-1].lives, "the newest wins"
        with closing(joined(server.port, "b")) as another:
            assert ask(another, number(1)) == number(1)


def test_streams_opened_at_once_that_neither_greet_nor_read(opened: ExitStack) -> None:
    with serving({"Trunk": Echo()}) as server, closing(joined(server.port)) as good:
        with ThreadPoolExecutor(8) as threads:
            raws = list(threads.map(lambda one: Raw(server.port, instance=f"i{one % 7}"), range(STREAMS)))
        for raw in raws:
            opened.enter_context(closing(raw))
            for _ in range(20):
                raw.send(pb.Gradient(gradient=pb.Matrix(data=bytes(100_000))))
        assert ask(good, number(1)) == number(1)
        with closing(joined(server.port)) as again:
            assert ask(again, number(2)) == number(2)
        until(lambda: sum(one.name == "requests of b" for one in threading.enumerate()) <= MAX_INSTANCES)


def test_many_streams_in_one_connection(opened: ExitStack) -> None:
    credentials = AUTHORITY.issue("b").client_credentials()
    with serving({"Trunk": Echo()}) as server, closing(joined(server.port)) as good:
        channel = opened.enter_context(
            grpc.secure_channel(f"localhost:{server.port}", credentials, (("grpc.ssl_target_name_override", "trunk"),))
        )
        open_stream = channel.stream_stream(METHOD_PATH.format("Trunk"), None, None)
        waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        calls = [open_stream(iter(waiting.get, b"")) for _ in range(STREAMS)]
        assert ask(good, number(1)) == number(1)
        for call in calls:
            call.cancel()
            waiting.put(b"")
        assert ask(good, number(2)) == number(2)


def test_a_half_dead_stream_gives_way_to_its_clients_next(opened: ExitStack) -> None:
    service = Late()
    with serving({"Trunk": service}) as server:
        old = opened.enter_context(closing(greeted(server.port)))
        old.send(number(1), id=1)
        until(lambda: service.held)
        new = opened.enter_context(closing(greeted(server.port)))
        until(lambda: not old.lives)
        new.send(number(1), id=1)
        new.send(number(2), id=2)
        until(lambda: len(service.held) == 2)
        service.answer()
        assert [new.read().id, new.read().id] == [1, 2]
        assert [one for one in service.requests if one != pb.Ping()] == [number(1), number(2)], "each handled once"


def test_a_process_that_made_room_is_told_so_and_the_newer_ones_go_on() -> None:
    with serving({"Trunk": Echo()}) as server, ExitStack() as opened:
        channels: list[GrpcChannel] = [
            opened.enter_context(closing(joined(server.port))) for _ in range(MAX_INSTANCES + 1)
        ]
        until(lambda: ended(channels[0]))
        with pytest.raises(ProtocolError, match="newer processes of a have connected") as told:
            channels[0].submit(number(1))
        assert "stop the other processes" in told.value.remedy
        for channel in channels[1:]:
            assert ask(channel, number(2)) == number(2)


def test_strangers_who_connect_and_say_nothing_are_turned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_server, "HANDSHAKE_SECONDS", 0.5)
    with serving({"Trunk": Echo()}) as server, closing(joined(server.port)) as good, ExitStack() as opened:
        silent = [opened.enter_context(socket.create_connection(("localhost", server.port))) for _ in range(100)]
        assert ask(good, number(1)) == number(1)
        with closing(joined(server.port, "b")) as another:
            assert ask(another, number(2)) == number(2)
        for one in silent:
            one.settimeout(HANG)
            with suppress(ConnectionError):
                while one.recv(4096):
                    pass
        assert ask(good, number(3)) == number(3)


def test_connections_without_a_stream_are_closed(monkeypatch: pytest.MonkeyPatch, opened: ExitStack) -> None:
    monkeypatch.setattr(wire_server, "IDLE_SECONDS", 0.5)
    with serving({"Trunk": Echo()}) as server, closing(joined(server.port)) as good:
        states: list[list[grpc.ChannelConnectivity]] = [[] for _ in range(20)]
        for seen in states:
            raw = opened.enter_context(closing(greeted(server.port)))
            raw._channel.subscribe(seen.append)
            raw.call.cancel()
        until(lambda: all(grpc.ChannelConnectivity.IDLE in seen for seen in states))
        assert ask(good, number(1)) == number(1), "a stream keeps its connection"


def test_a_huge_name_of_a_process_is_refused() -> None:
    with serving({"Trunk": Echo()}) as server, closing(joined(server.port)) as good:
        with closing(Raw(server.port, instance="i" * 1000)) as raw:
            raw.send()
            with suppress(grpc.RpcError):
                raw.read()
            assert raw.call.code() is FrameError.status
            assert raw.call.code() is grpc.StatusCode.INVALID_ARGUMENT
        with closing(Raw(server.port, instance="i" * 100_000)) as raw:
            raw.send()
            with pytest.raises(grpc.RpcError):
                raw.read()
        assert good.submit(number(1)).result(HANG) == number(1)
