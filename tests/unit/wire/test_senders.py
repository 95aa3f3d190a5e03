"""Who may send what: by service, kind and role, with the way to whoever takes it."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message

from isthmus.errors import ProtocolError
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.identity import Role
from isthmus.wire.senders import ServiceName, check_sender


@pytest.mark.parametrize(
    ("service", "role", "request_"),
    [
        ("Trunk", "silo", pb.Forward()),
        ("Root", "silo", pb.Deal()),
        ("Root", "edge", pb.Update()),
        ("Root", "silo", pb.Ping()),
        ("Authority", "trunk", pb.Enroll()),
        ("Model", "silo", pb.Fetch()),
        ("Moves", "silo", pb.Move()),
        ("Moves", "root", pb.Move()),
    ],
)
def test_what_may_be_sent_is_let_through(service: ServiceName, role: Role, request_: Message) -> None:
    check_sender("the server", service, role, request_)


@pytest.mark.parametrize(
    ("service", "role", "request_", "remedy"),
    [
        ("Trunk", "silo", pb.Deal(), "send it to the edge or root above"),
        ("Trunk", "edge", pb.Forward(), "same version"),
        ("Trunk", "edge", pb.Ready(), "send it to the edge or root above"),
        ("Root", "silo", pb.Commit(), "send it to the trunk"),
        ("Root", "edge", pb.Deal(), "same version"),
        ("Root", "root", pb.Ping(), "send it to the authority"),
        ("Root", "silo", pb.Plan(), "same version"),
        ("Model", "edge", pb.Listing(), "same version"),
        ("Moves", "edge", pb.Move(), "same version"),
        ("Moves", "root", pb.Forward(), "same version"),
        ("Trunk", "root", pb.Move(), "send it to the trunk, as a move of the cut"),
        ("Trunk", "silo", pb.Enroll(), "send it to the authority"),
        ("Root", "silo", pb.Listing(), "send it to the trunk, as a request for its files"),
    ],
)
def test_all_else_is_refused_by_name(service: ServiceName, role: Role, request_: Message, remedy: str) -> None:
    told = f"the server does not answer {type(request_).__name__} requests of {role}s"
    with pytest.raises(ProtocolError, match=told) as caught:
        check_sender("the server", service, role, request_)
    assert remedy in caught.value.remedy
