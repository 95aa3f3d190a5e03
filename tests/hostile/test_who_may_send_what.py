"""Every kind of message of the protocol, from every role, to every server: what the table allows is taken, all else is
refused by name, and normal service goes on.

The servers are those that 'isthmus trunk', 'root' and 'edge' start, with real certificates over gRPC.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import grpc
import pytest
from google.protobuf.message import Message

from isthmus.errors import IsthmusError, ProtocolError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer
from isthmus.wire.client import GrpcChannel
from isthmus.wire.frames import ANSWERS
from isthmus.wire.identity import Identity, Role
from isthmus.wire.senders import SENDERS, ServiceName
from isthmus.wire.server import METHOD_PATH
from tests.conformance.test_channels import HANG
from tests.conftest import save_tiny_model
from tests.hostile.served import SERVICE, Served, free_port
from tests.unit.wire.test_frames import VALID, changed

PAGE = Path(__file__).parents[2] / "docs" / "threat-model.md"
ROLES: tuple[Role, ...] = get_args(Role)
KINDS = sorted(VALID)
FLAT = ("a", "b", "c")
TREE = ("a", "b", "c", "d", "e", "f")


class Place(NamedTuple):
    """A server of one of the federations, and a party that may connect to it."""

    federation: str
    server: str
    child: str
    role: Role
    strangers: tuple[tuple[str, Role], ...]
    """Certified parties of the federation that have nothing to do with this server."""


PLACES = {
    "trunk": Place("flat", "trunk", "a", "silo", (("a", "edge"), ("x", "silo"))),
    "root over silos": Place("flat", "root", "a", "silo", (("a", "edge"), ("x", "silo"))),
    "moves, of a silo": Place("flat", "moves", "a", "silo", (("a", "edge"), ("x", "silo"))),
    "moves, of the root": Place("flat", "moves", "root", "root", (("root", "silo"), ("x", "silo"))),
    "trunk of a tree": Place("tree", "trunk", "d", "silo", (("top", "edge"), ("left", "edge"))),
    "root over edges": Place("tree", "root", "top", "edge", (("top", "silo"), ("left", "edge"), ("a", "silo"))),
    "edge over edges": Place("tree", "top", "left", "edge", (("left", "silo"), ("a", "silo"), ("top", "edge"))),
    "edge over silos": Place("tree", "left", "a", "silo", (("a", "edge"), ("d", "silo"), ("right", "edge"))),
}


@pytest.fixture(scope="module")
def federations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """One without edges, whose cut moves, and one with two tiers of edges, both with masks: every kind of request has
    its place."""
    model = save_tiny_model("llama", tmp_path_factory.mktemp("model"), blocks=4)
    shared: dict[str, Any] = {"federation": {"secure": True}, "train": {"rounds": 2, "evaluate": False}}
    edges = [
        {"name": name, "address": f"localhost:{free_port()}", **below}
        for name, below in (
            ("top", {"silos": []}),
            ("left", {"silos": TREE[:3], "parent": "top"}),
            ("right", {"silos": TREE[3:], "parent": "top"}),
        )
    ]
    with (
        Served(
            model, tmp_path_factory.mktemp("flat"), silos=FLAT, model={"moves": [{"after": 1, "bottom": 2}]}, **shared
        ) as flat,
        Served(model, tmp_path_factory.mktemp("tree"), silos=TREE, edge=edges, **shared) as tree,
    ):
        yield {"flat": flat, "tree": tree}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    return PLACES[request.param]


@pytest.fixture(scope="module")
def channels(federations: dict[str, Served]) -> dict[Place, GrpcChannel]:
    """Of each server's child, greeted as it should be."""
    return {one: federations[one.federation].channel(one.server, one.child) for one in PLACES.values()}


@pytest.fixture
def served(place: Place, federations: dict[str, Served]) -> Served:
    return federations[place.federation]


def service_of(place: Place) -> Any:
    return SERVICE.get(place.server, "Root")


def request_of(served: Served, place: Place, kind: str) -> Message:
    return served.hello(place.server) if kind == "hello" else changed(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_of_who_may_connect_just_the_table_is_taken(
    kind: str, place: Place, served: Served, channels: dict[Place, GrpcChannel]
) -> None:
    channel, request = channels[place], request_of(served, place, kind)
    answer = channel.submit(request)
    assert channel.submit(pb.Ping()).result(HANG) == pb.Pong()  # a refusal has come before it
    told = rf"does not answer {type(request).__name__} requests of {place.role}s"
    if place.role in SENDERS[service_of(place)].get(type(request), ()):
        assert_taken(answer, request)
    else:
        with pytest.raises(ProtocolError, match=told) as caught:
            answer.result(HANG)
        assert ("send it to the" in caught.value.remedy) == somewhere(place.role, type(request))
    assert_serves(place, channel)


def somewhere(role: Role, kind: type[Message]) -> bool:
    """Whether this role may send this to anybody."""
    return any(role in senders.get(kind, ()) for senders in SENDERS.values())


def assert_taken(answer: Answer, request: Message) -> None:
    """It is answered as such a request is, or has another reason why not; or it waits for other parties."""
    if frames.waits_for_others(request) and not answer.done():
        return
    reason = answer.exception(HANG)
    if reason is None:
        frames.check_answer(type(request), answer.result())
    else:
        assert isinstance(reason, IsthmusError)
        assert not re.search("does not answer|before Hello", reason.message)


def assert_serves(place: Place, channel: GrpcChannel) -> None:
    if place.server == "moves":
        assert channel.submit(pb.Move()).result(HANG) == pb.Moved()
    elif place.server == "trunk":
        assert channel.submit(pb.Close(session=7)).result(HANG) == pb.Closed()
    else:
        assert isinstance(channel.submit(pb.Current()).result(HANG), pb.Adapters)


def unlike(place: Place, served: Served) -> Iterator[tuple[str, Identity]]:
    """Certificates of this authority with which nobody may connect here."""
    for role in ROLES:
        if role != place.role:
            yield f"{place.child} as {role}", served.issue(place.child, role)
    roots = [] if place.server == "moves" else [("root", "root")]
    for name, role in (*place.strangers, ("trunk", "trunk"), *roots):
        yield f"{name} as {role}", served.issue(name, role)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_of_anybody_else_nothing_is_heard(
    kind: str | None, place: Place, served: Served, channels: dict[Place, GrpcChannel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``None``: all kinds in one stream."""
    heard: list[str] = []
    service, name = served.services[service_key(place)], service_of(place)
    handle = service.handle
    monkeypatch.setattr(service, "handle", lambda peer, request: (heard.append(peer), handle(peer, request))[1])
    bodies = [request_of(served, place, one) for one in ([kind] if kind else KINDS)]
    data = [frames.wrap(body, id=number).SerializeToString() for number, body in enumerate(bodies)]
    strangers = list(unlike(place, served))
    for who, identity in strangers if kind is None else [strangers[KINDS.index(kind) % len(strangers)]]:
        assert (
            status_of(served.servers[place.server].port, served.certified(place.server), name, identity, data)
            in REFUSED
        ), who
    assert not heard
    monkeypatch.undo()
    assert_serves(place, channels[place])


REFUSED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE)
"""By the server, or by TLS itself, which takes no client with a server's certificate."""


def service_key(place: Place) -> str:
    return SERVICE.get(place.server, place.server)


def status_of(port: int, server: str, service: str, identity: Identity, data: list[bytes]) -> grpc.StatusCode:
    """The status with which a stream of these bytes ends."""
    options = (("grpc.ssl_target_name_override", server),)
    with grpc.secure_channel(f"localhost:{port}", identity.client_credentials(), options) as opened:
        call = opened.stream_stream(METHOD_PATH.format(service), None, None)(iter(data), timeout=HANG)
        with pytest.raises(grpc.RpcError):
            list(call)
        status: grpc.StatusCode = call.code()
        return status


def rows() -> Iterator[tuple[set[str], list[tuple[str, ...]]]]:
    """The rows of the page's table: kinds, and for each service the roles."""
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("## Who may send what") :].split("\n## ")[0]
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith(("| `", "| answers")):
            roles = [tuple(one.strip() for one in cell.split(",") if one.strip() != "nobody") for cell in cells[1:]]
            yield set(re.findall(r"`(\w+)`", cells[0])), roles


def test_the_page_has_this_table() -> None:
    """Each kind of message of the protocol once, with just the roles that the code lets send it."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for kinds, roles in rows():
        assert not kinds & found.keys()
        found |= dict.fromkeys(kinds, roles)
    bodies = {field.message_type.name for field in pb.Frame.DESCRIPTOR.oneofs_by_name["body"].fields}
    assert found.keys() == bodies
    for name, roles in found.items():
        kind = getattr(pb, name)
        columns: tuple[ServiceName, ...] = ("Trunk", "Root", "Authority", "Model", "Moves")
        assert roles == [SENDERS[service].get(kind, ()) for service in columns], name
    assert {kind for senders in SENDERS.values() for kind in senders} == set(ANSWERS)
