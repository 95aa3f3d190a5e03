"""Offers: fresh keys signed by their party, which nobody who passes them on can exchange."""

from __future__ import annotations

import pytest

from isthmus.errors import IdentityError
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.identity import Identity
from isthmus.wire.sum_keys import sign_keys, sign_survivors, signers, verify_keys

AUTHORITY = Authority()
ANN, BOB = AUTHORITY.issue("ann"), AUTHORITY.issue("bob")


def keys(identity: Identity = ANN) -> pb.SumKeys:
    return sign_keys(identity, sealing=bytes([1]) * 32, masking=bytes([2]) * 32, commitment=bytes([3]) * 32)


def test_a_partys_own_offer_is_believed() -> None:
    verify_keys(BOB, "ann", keys())


@pytest.mark.parametrize("field", ["sealing", "masking", "commitment"])
def test_an_exchanged_key_is_not(field: str) -> None:
    altered = keys()
    setattr(altered, field, bytes(32))
    with pytest.raises(IdentityError):
        verify_keys(BOB, "ann", altered)


def test_an_offer_of_another_party_or_authority_is_not() -> None:
    with pytest.raises(IdentityError):
        verify_keys(BOB, "ann", keys(BOB))
    with pytest.raises(IdentityError):
        verify_keys(BOB, "ann", keys(Authority().issue("ann")))


def test_only_those_who_signed_these_very_survivors_count() -> None:
    offers = {"ann": keys(), "bob": keys(BOB)}
    living, others = pb.Survivors(alive=["bob", "ann"], dropped=["eve"]), pb.Survivors(alive=["ann", "bob", "eve"])
    signatures = {one.name: sign_survivors(one, b"terms", living, learned=one is ANN) for one in (ANN, BOB)}
    same = pb.Survivors(alive=["ann", "bob"], dropped=["eve"])
    assert signers(ANN, offers, signatures, b"terms", same, enough=2) == {"ann": True, "bob": False}
    assert signers(ANN, offers, signatures, b"terms", same, enough=1, changes=1) == {"ann": True}
    assert signers(ANN, offers, signatures, b"terms", same, enough=1, changes=2) == {"ann": True, "bob": False}
    assert signers(ANN, offers, signatures, b"terms", others, enough=3) == {}
    assert signers(ANN, offers, signatures, b"other terms", living, enough=3) == {}
    assert signers(ANN, offers, signatures | {"bob": signatures["ann"]}, b"terms", living, enough=3) == {"ann": True}
    assert signers(ANN, offers, {"eve": signatures["ann"]}, b"terms", living, enough=3) == {}
