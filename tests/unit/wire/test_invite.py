"""Invites: what a line holds, and that no other line is taken for one."""

from __future__ import annotations

import datetime

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import IdentityError, RecipeError
from isthmus.wire.authority import Authority
from isthmus.wire.identity import Role
from isthmus.wire.invite import INVITE_PREFIX, Invite, fingerprint, key_of

AUTHORITY = Authority()
NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,62}", fullmatch=True)
ROLES = st.sampled_from(["silo", "edge", "trunk", "root"])
ADDRESSES = st.sampled_from(["localhost:1", "a.example.org:65535", "[::1]:7001", "10.0.0.1:50051"])


def made(name: str = "north", role: Role = "silo", address: str = "a.example.org:7001", days: float = 7) -> Invite:
    return Invite.make(name, role, address, "trunk", AUTHORITY.public_key, days=days)


@given(NAMES, ROLES, ADDRESSES, st.floats(0.001, 3000))
def test_a_line_holds_the_whole_invite(name: str, role: Role, address: str, days: float) -> None:
    invite = made(name, role, address, days)
    line = str(invite)
    assert line.startswith(INVITE_PREFIX)
    assert not set(line) & set(" \n\"'$`\\!&;|<>*?()")  # pasted into a shell it stays one word
    assert Invite.parse(line) == invite
    wrapped = "\n ".join(line[start : start + 40] for start in range(0, len(line), 40))  # as mail programs do
    assert Invite.parse(f"  {wrapped}\n") == invite


@given(st.data())
def test_a_changed_or_cut_line_is_refused(data: st.DataObject) -> None:
    line = str(made())
    at = data.draw(st.integers(0, len(line) - 1))
    other = data.draw(st.sampled_from("aZ09-_:=é ").filter(lambda one: one != line[at]))
    for text in (line[:at], line[:at] + other + line[at + 1 :], line + other):
        if "".join(text.split()) != line:
            with pytest.raises(IdentityError) as caught:
                Invite.parse(text)
            assert "isthmus invite" in caught.value.remedy


@pytest.mark.parametrize("text", ["", "north", INVITE_PREFIX, f"{INVITE_PREFIX}é", "isthmus", "https://example.org"])
def test_what_is_no_invite(text: str) -> None:
    with pytest.raises(IdentityError, match="no invite"):
        Invite.parse(text)


def test_each_invite_has_a_secret_of_its_own() -> None:
    one, other = made(), made()
    assert one.secret != other.secret
    assert one.id != other.id
    assert one.secret.hex() not in one.id
    assert one.fingerprint == other.fingerprint == fingerprint(key_of(AUTHORITY.certificate))


def test_the_anchor_signs_the_guests_certificate_and_no_other_invites_does() -> None:
    one, other = made(), made()
    guest = x509.load_pem_x509_certificate(one.guest().certificate)
    guest.verify_directly_issued_by(x509.load_pem_x509_certificate(one.anchor))
    with pytest.raises(Exception, match=r".*") as caught:
        guest.verify_directly_issued_by(x509.load_pem_x509_certificate(other.anchor))
    assert type(caught.value).__name__ in ("InvalidSignature", "ValueError")


def test_both_sides_derive_the_same_key_pair() -> None:
    invite = made()
    again = Invite.parse(str(invite))
    x509.load_pem_x509_certificate(again.guest().certificate).verify_directly_issued_by(
        x509.load_pem_x509_certificate(invite.anchor)
    )


def test_expiry_is_whole_seconds_from_now() -> None:
    left = made(days=2).expires - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=2, seconds=-2) < left <= datetime.timedelta(days=2)


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(RecipeError, match="address"):
        made(address="http://example.org")
