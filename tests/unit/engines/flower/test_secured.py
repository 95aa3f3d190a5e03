"""A TLS connection whose bytes a test carries."""

from __future__ import annotations

import random

import pytest

from isthmus.engines.flower.secured import Secured
from isthmus.errors import FrameSizeError, IdentityError
from isthmus.wire.authority import Authority
from isthmus.wire.identity import Identity

AUTHORITY = Authority()
ROOT, SILO = AUTHORITY.issue("trunk", also=("root",)), AUTHORITY.issue("north")


def pair(silo: Identity = SILO, root: Identity = ROOT, limit: int = 2**24) -> tuple[Secured, Secured]:
    return Secured(silo, server="root", limit=limit), Secured(root, limit=limit)


def connect(silo: Secured, root: Secured) -> None:
    """Carry the handshake."""
    root.receive(silo.outgoing())
    silo.receive(root.outgoing())
    assert root.receive(silo.outgoing()) == []
    assert silo.established
    assert root.established


def test_messages_cross_whole_whatever_they_are_cut_into() -> None:
    silo, root = pair()
    connect(silo, root)
    draw = random.Random(0)
    messages = [draw.randbytes(size) for size in (0, 1, 5, 100_000, 2_000_000)]
    for message in messages:
        silo.send(message)
    data, found = silo.outgoing(), []
    while data:
        size = draw.choice((1, 7, 4096, 500_000))
        found += root.receive(data[:size])
        data = data[size:]
    assert found == messages


def test_what_is_sent_early_goes_with_the_handshakes_end_and_needs_two_letters() -> None:
    silo, root = pair()
    silo.send(b"question")
    root.receive(silo.outgoing())
    assert silo.receive(root.outgoing()) == []
    assert root.receive(silo.outgoing()) == [b"question"]
    assert not root.has_outgoing, "no ticket that would be a message of its own"


def test_each_sees_the_others_certificate_and_nobody_the_text() -> None:
    silo, root = pair()
    connect(silo, root)
    ROOT.check_peer(root.certificate(), "north", "silo")
    SILO.check_peer(silo.certificate(), "trunk", "trunk")
    silo.send(b"patient Smith")
    assert b"patient Smith" not in silo.outgoing()


def test_a_silo_of_another_authority_is_refused_by_the_root() -> None:
    other = Authority().issue("north")
    forged = Identity("north", AUTHORITY.certificate, other.certificate, other.key)
    silo, root = pair(silo=forged)
    root.receive(silo.outgoing())
    silo.receive(root.outgoing())
    with pytest.raises(IdentityError, match="through Flower"):
        root.receive(silo.outgoing())
    with pytest.raises(IdentityError, match="through Flower"):
        silo.receive(root.outgoing())  # the alert


@pytest.mark.parametrize("root", [Authority().issue("root"), AUTHORITY.issue("north")], ids=["authority", "name"])
def test_a_root_that_is_none_is_refused_by_the_silo(root: Identity) -> None:
    silo, other = pair(root=root)
    other.receive(silo.outgoing())
    with pytest.raises(IdentityError, match="through Flower"):
        silo.receive(other.outgoing())


def test_a_changed_byte_is_noticed() -> None:
    silo, root = pair()
    connect(silo, root)
    silo.send(b"weights")
    data = bytearray(silo.outgoing())
    data[-1] ^= 1
    with pytest.raises(IdentityError, match="through Flower"):
        root.receive(bytes(data))


def test_a_message_over_the_limit_is_refused_at_both_ends() -> None:
    silo, root = pair()
    connect(silo, root)
    small, _ = pair(limit=10)
    with pytest.raises(FrameSizeError, match="the limit is 10"):
        small.send(bytes(11))
    root._limit = 10
    silo.send(bytes(11))
    with pytest.raises(FrameSizeError, match="the limit is 10"):
        root.receive(silo.outgoing())
