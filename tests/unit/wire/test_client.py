"""The gRPC channel's own part: who it greets, when it gives up, and what ends it for good."""

from __future__ import annotations

from contextlib import closing

import pytest

from isthmus.errors import FrameSizeError, IdentityError, MismatchError, PeerGoneError, RunError
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, answered
from isthmus.wire.client import GrpcChannel
from isthmus.wire.frames import VERSION
from isthmus.wire.identity import Authority
from tests.conformance.test_channels import AUTHORITY, HANG, SILOS, Echo, number, serving

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


def test_nobody_at_the_address_is_named_after_the_deadline() -> None:
    with pytest.raises(PeerGoneError, match="no connection to trunk at localhost:1 for"):
        GrpcChannel("localhost:1", "Trunk", AUTHORITY.issue(SILO), deadline=0.1)
