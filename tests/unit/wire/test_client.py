"""The gRPC channel's own part: who it greets, when it gives up, and what ends it for good."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress

import pytest

from isthmus.errors import (
    FrameSizeError,
    IdentityError,
    IsthmusError,
    MismatchError,
    PeerGoneError,
    RecipeError,
    RunError,
)
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.channel import Answer, answered
from isthmus.wire.client import EXEMPT, PROXIES, GrpcChannel, own_replica, proxy_note
from isthmus.wire.frames import VERSION
from isthmus.wire.server import Server
from tests.conformance.test_channels import AUTHORITY, HANG, SILOS, Echo, Late, number, serving, until
from tests.unit.wire.test_identity import Forwarder

HELLO = pb.Hello(version=VERSION, instance=bytes(8).hex(), fingerprint="f" * 64, bottom=1, top=1)
SILO = sorted(SILOS)[0]


class Choosy(Echo):
    """Refuses who greets it."""

    def handle(self, peer: str, request: object) -> Answer:
        raise MismatchError("another model", remedy="use the same")


def channel_to(port: int, *, authority: Authority = AUTHORITY, name: str = SILO, **options: object) -> GrpcChannel:
    return GrpcChannel(f"localhost:{port}", "Trunk", authority.issue(name), deadline=HANG, **options)  # type: ignore[arg-type]


def test_it_greets_and_is_answered() -> None:
    service = Echo()
    with serving({"Trunk": service}) as server, closing(channel_to(server.port)) as channel:
        assert channel.call(number(3)) == number(3)
        assert channel.sent_bytes > 0
        assert channel.received_bytes > 0
    assert service.requests[0] == pb.Ping()


def test_who_refuses_the_greeting_ends_the_channel() -> None:
    with serving({"Trunk": Choosy()}) as server, pytest.raises(MismatchError, match="another model"):
        channel_to(server.port, greeting=HELLO)


class Welcoming(Echo):
    """Welcomes who greets it, in this round."""

    completed = 2

    def handle(self, peer: str, request: object) -> Answer:
        if isinstance(request, pb.Hello):
            return answered(pb.Welcome(completed=self.completed))
        return super().handle(peer, request)  # type: ignore[arg-type]


def test_a_welcome_is_kept_and_may_be_refused() -> None:
    def accept(welcome: pb.Welcome) -> None:
        if welcome.completed != 2:
            raise RunError("another round", remedy="open again")

    service = Welcoming()
    with serving({"Trunk": service}) as server:
        with closing(channel_to(server.port)) as channel:  # greeted by a ping
            assert channel.welcome == pb.Welcome()
        with closing(channel_to(server.port, greeting=HELLO, accept=accept)) as channel:
            assert channel.welcome.completed == 2
        service.completed = 3
        with pytest.raises(RunError, match="another round"):
            channel_to(server.port, greeting=HELLO, accept=accept)


def test_a_successor_that_is_not_accepted_ends_the_channel() -> None:
    def accept(welcome: pb.Welcome) -> None:
        if welcome.completed != 2:
            raise RunError("another round", remedy="open again")

    service = Welcoming()
    with serving({"Trunk": service}) as server:
        channel = channel_to(server.port, greeting=HELLO, accept=accept)
    service.completed = 3
    address = f"localhost:{server.port}"
    with (
        serving({"Trunk": service}, address=address),
        closing(channel),
        pytest.raises(RunError, match="another round"),
    ):
        channel.call(number(1))


def test_a_stranger_is_refused_without_further_tries() -> None:
    with serving({"Trunk": Echo()}) as server, pytest.raises(IdentityError):
        channel_to(server.port, authority=Authority())


def test_after_its_end_everything_fails_by_name() -> None:
    with serving({"Trunk": Echo()}) as server:
        channel = channel_to(server.port)
        channel.close()
        with pytest.raises(PeerGoneError, match="was closed on this side"):
            channel.submit(number(1))


def test_a_frame_over_the_limit_is_not_sent() -> None:
    with serving({"Trunk": Echo()}) as server, closing(channel_to(server.port, limit=4096)) as channel:
        before = channel.sent_bytes
        with pytest.raises(FrameSizeError):
            channel.submit(pb.Update(round=1, masked=bytes(5000)))
        assert channel.sent_bytes == before
        assert channel.call(number(1)) == number(1)


@pytest.mark.parametrize("address", ["localhost", "localhost:0", "http://localhost:1"])
def test_an_address_that_is_none_is_not_tried(address: str) -> None:
    with pytest.raises(RecipeError, match="expected "):
        GrpcChannel(address, "Trunk", AUTHORITY.issue(SILO), deadline=HANG)


def test_nobody_at_the_address_is_named_after_the_deadline() -> None:
    with pytest.raises(PeerGoneError, match="no connection to trunk at localhost:1 for"):
        GrpcChannel("localhost:1", "Trunk", AUTHORITY.issue(SILO), deadline=0.1)


def test_an_endless_channel_waits_for_a_server_that_comes_after_the_deadline(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
    address = f"localhost:{port}"
    with ThreadPoolExecutor(1) as threads:
        joining = threads.submit(GrpcChannel, address, "Trunk", AUTHORITY.issue(SILO), deadline=0.1, endless=True)
        time.sleep(0.5)
        assert not joining.done()
        with serving({"Trunk": Echo()}, address=address), closing(joining.result(HANG)) as channel:
            assert channel.call(number(3)) == number(3)
    assert f"no connection to trunk at {address}; waiting until it is there" in caplog.text


def test_an_endless_channel_says_now_and_then_who_is_waited_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.wire.client.SAID_SECONDS", 0.1)
    monkeypatch.setattr("isthmus.wire.client.PAUSES", (0.01, 0.02))
    service = Echo()
    with serving({"Trunk": service}) as server:
        channel = GrpcChannel(
            f"localhost:{server.port}", "Trunk", AUTHORITY.issue(SILO), deadline=0.1, endless=True, limit=2**20
        )
    with closing(channel):
        until(lambda: caplog.text.count("still waiting") > 2)
        assert f"no connection to trunk at localhost:{server.port} for" in caplog.text


def test_an_endless_channel_leaves_a_connection_on_which_the_server_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    """As if the server's host were unplugged: no end of the connection is seen, and no byte comes."""
    service = Echo()
    with serving({"Trunk": service}) as server, closing(Forwarder(server.port)) as cable:
        identity, address = AUTHORITY.issue(SILO), f"localhost:{cable.port}"
        with closing(GrpcChannel(address, "Trunk", identity, deadline=0.4, endless=True)) as channel:
            assert channel.call(number(1)) == number(1)
            cable.vanish()
            waiting = [channel.submit(number(value)) for value in (2, 3)]
            until(lambda: caplog.text.count("connecting again") > 2)
            assert not any(one.done() for one in waiting)
            cable.return_again()
            assert [one.result(HANG) for one in waiting] == [number(2), number(3)]
            assert channel.call(number(4)) == number(4)
    assert [one for one in service.requests if one != pb.Ping()] == [number(value) for value in (1, 2, 3, 4)]


def test_time_without_a_connection_is_no_time_to_answer() -> None:
    service = Echo()
    with serving({"Trunk": service}) as server, closing(Forwarder(server.port)) as cable:
        options = {"deadline": 0.2, "answer_deadline": 0.4, "endless": True}
        with closing(GrpcChannel(f"localhost:{cable.port}", "Trunk", AUTHORITY.issue(SILO), **options)) as channel:  # type: ignore[arg-type]
            cable.vanish()
            waiting = channel.submit(pb.Ping())
            time.sleep(2.0)
            assert not waiting.done()
            cable.return_again()
            assert waiting.result(HANG) == pb.Pong()


def test_waiting_mends_neither_a_stranger_nor_a_mismatch() -> None:
    with serving({"Trunk": Choosy()}) as server:
        for authority, error in ((AUTHORITY, MismatchError), (Authority(), IdentityError)):
            with pytest.raises(error):
                channel_to(server.port, authority=authority, greeting=HELLO, endless=True)


def channel_to_both(first: str, other: str, **options: object) -> GrpcChannel:
    """A channel that begins with the first of two replicas."""
    address, replica = (other, first) if own_replica(SILO, 2) else (first, other)
    settings: dict[str, object] = {"deadline": HANG} | options
    return GrpcChannel(address, "Trunk", AUTHORITY.issue(SILO), replicas=[replica], **settings)  # type: ignore[arg-type]


def at(server: Server) -> str:
    return f"localhost:{server.port}"


def test_parties_spread_over_replicas_and_come_back_to_their_own() -> None:
    begun = Counter(own_replica(f"silo-{number}", 4) for number in range(1000))
    assert all(200 < begun[place] < 300 for place in range(4))
    with serving({"Trunk": Echo()}) as one, serving({"Trunk": Echo()}) as other:
        for name in SILOS:
            for _ in range(2):
                with closing(
                    GrpcChannel(at(one), "Trunk", AUTHORITY.issue(name), replicas=[at(other)], deadline=HANG)
                ) as channel:
                    assert channel.address == (at(one), at(other))[own_replica(name, 2)]


def test_what_was_not_answered_goes_to_the_next_replica() -> None:
    late, service = Late(), Echo()
    with serving({"Trunk": service}) as other, ExitStack() as first:
        one = first.enter_context(serving({"Trunk": late}))
        with closing(channel_to_both(at(one), at(other))) as channel:
            assert channel.address == at(one)
            waiting = [channel.submit(number(value)) for value in (1, 2)]
            until(lambda: len(late.held) == 2)
            first.close()
            assert [one.result(HANG) for one in waiting] == [number(1), number(2)]
            assert channel.address == at(other)
    assert [request for request in service.requests if request != pb.Ping()] == [number(1), number(2)]


def test_one_name_may_have_several_addresses() -> None:
    """As ``localhost`` has two, and the name of a service in a cluster one for each replica."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with ExitStack() as stack:
        running = {}
        for address in (f"127.0.0.1:{port}", f"[::1]:{port}"):
            running[address] = stack.enter_context(ExitStack()), Echo()
            try:
                running[address][0].enter_context(serving({"Trunk": running[address][1]}, address=address))
            except IsthmusError:
                pytest.skip("this machine has no IPv6")
        with closing(channel_to(port)) as channel:
            assert channel.call(number(1)) == number(1)
            (used, _) = next(one for one in running.values() if number(1) in one[1].requests)
            used.close()
            assert channel.call(number(2)) == number(2)


def test_a_broken_connection_alone_is_no_reason_to_turn() -> None:
    with serving({"Trunk": Echo()}) as one, closing(Forwarder(one.port)) as cable, serving({"Trunk": Echo()}) as other:
        mine, theirs = f"localhost:{cable.port}", at(other)
        with closing(channel_to_both(mine, theirs)) as channel:
            assert channel.address == mine
            for value in range(3):
                cable.cut()
                assert channel.call(number(value)) == number(value)
                assert channel.address == mine


def test_a_silent_replica_is_left_for_the_next(caplog: pytest.LogCaptureFixture) -> None:
    with serving({"Trunk": Echo()}) as one, closing(Forwarder(one.port)) as cable, serving({"Trunk": Echo()}) as other:
        mine, theirs = f"localhost:{cable.port}", at(other)
        with closing(channel_to_both(mine, theirs, deadline=0.4)) as channel:
            assert channel.call(number(1)) == number(1)
            cable.vanish()
            assert channel.submit(number(2)).result(HANG) == number(2)
            assert channel.address == theirs
    assert f"turning to {theirs}" in caplog.text


class Behind(Welcoming):
    """Serves an earlier round."""

    completed = 1


@pytest.mark.parametrize("wrong", [Choosy, Behind])
def test_a_replica_that_will_not_do_is_left_out(wrong: type[Echo], caplog: pytest.LogCaptureFixture) -> None:
    def accept(welcome: pb.Welcome) -> None:
        if welcome.completed != 2:
            raise RunError("another round", remedy="open again")

    with serving({"Trunk": wrong()}) as one, ExitStack() as right:
        other = right.enter_context(serving({"Trunk": Welcoming()}))
        with closing(channel_to_both(at(one), at(other), greeting=HELLO, accept=accept)) as channel:
            assert channel.welcome.completed == 2
            assert channel.call(number(1)) == number(1)
        assert f"the trunk at {at(one)} is left out: another" in caplog.text
        with pytest.raises((MismatchError, RunError), match="another"):
            channel_to_both(at(one), at(one), greeting=HELLO, accept=accept)


def test_replicas_that_are_all_gone_are_named_after_the_deadline() -> None:
    with pytest.raises(PeerGoneError, match=r"at localhost:\d or localhost:\d for"):
        channel_to_both("localhost:1", "localhost:2", deadline=0.3)


def test_who_stays_does_not_turn() -> None:
    with serving({"Trunk": Echo()}) as other, ExitStack() as first:
        one = first.enter_context(serving({"Trunk": Echo()}))
        with closing(channel_to_both(at(one), at(other), deadline=0.3)) as channel:
            channel.stay()
            first.close()
            with pytest.raises(PeerGoneError, match=f"no connection to trunk at {at(one)}"):
                channel.call(number(1))


class Proxy:
    """An HTTP proxy that connects whatever it is asked for to one port of this machine."""

    def __init__(self, port: int) -> None:
        self.asked: list[str] = []
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                inward, _ = self._listener.accept()
                request = inward.recv(4096).decode()
                self.asked.append(request.split()[1])
                outward = socket.create_connection(("127.0.0.1", self._target))
                inward.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                for one, other in ((inward, outward), (outward, inward)):
                    threading.Thread(target=_copy, args=(one, other), daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError), source, target:
        while data := source.recv(65536):
            target.sendall(data)


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, *EXEMPT):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize("name", PROXIES)
def test_no_proxy_is_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody is there
    with serving({"Trunk": Echo()}) as server, closing(channel_to(server.port)) as channel:
        assert channel.call(number(3)) == number(3)


@pytest.mark.usefixtures("no_proxies")
def test_another_machine_is_reached_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"Trunk": Echo()}) as server, closing(Proxy(server.port)) as proxy:
        monkeypatch.setenv("https_proxy", f"http://{proxy.address}")
        identity, address = AUTHORITY.issue(SILO), f"trunk.example.org:{server.port}"
        with closing(GrpcChannel(address, "Trunk", identity, deadline=HANG)) as channel:
            assert channel.call(number(3)) == number(3)
        assert set(proxy.asked) == {address}


@pytest.mark.usefixtures("no_proxies")
def test_a_proxy_that_is_not_there_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:1")
    told = r"no connection to trunk at example\.org:7001 through the proxy 127\.0\.0\.1:1 \(from http_proxy\) for"
    with pytest.raises(PeerGoneError, match=told) as caught:
        GrpcChannel("example.org:7001", "Trunk", AUTHORITY.issue(SILO), deadline=0.1)
    assert "no_proxy" in caught.value.remedy
    assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, ""),
        ({"grpc_proxy": "a:1", "https_proxy": "b:1"}, " through the proxy a:1 (from grpc_proxy)"),
        ({"https_proxy": "http://b:1", "http_proxy": "c:1"}, " through the proxy b:1 (from https_proxy)"),
        ({"https_proxy": "b:1", "no_proxy": "other.org"}, " through the proxy b:1 (from https_proxy)"),
        ({"https_proxy": "b:1", "no_proxy": "other.org, example.org"}, ""),
        ({"https_proxy": "b:1", "no_proxy": ".org"}, ""),
        ({"https_proxy": "b:1", "no_grpc_proxy": "example.org"}, ""),
        ({"HTTPS_PROXY": "b:1"}, " without a proxy (HTTPS_PROXY is set, but gRPC reads https_proxy)"),
    ],
    ids=str,
)
def test_how_the_environment_bears_on_a_connection(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], told: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert proxy_note("example.org:7001") == told
    assert proxy_note("localhost:7001") == ""
