"""Secrets come back from any ``threshold`` shares, and from no fewer."""

from __future__ import annotations

import itertools
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import ProtocolError
from isthmus.updates import shamir

SECRETS = st.one_of(st.binary(min_size=32, max_size=32), st.sampled_from([bytes(32), b"\xff" * 32]))


@given(SECRETS, st.integers(1, 6), st.integers(0, 3))
def test_any_threshold_shares_give_the_secret(secret: bytes, threshold: int, more: int) -> None:
    shares = shamir.split(secret, range(1, threshold + more + 1), threshold)
    for points in itertools.combinations(shares, threshold):
        assert shamir.reconstruct({point: shares[point] for point in points}, threshold) == secret


def test_fewer_shares_fit_every_secret() -> None:
    """For two shares of three needed and any other secret there is a third share that leads to it."""
    secret, other = secrets.token_bytes(32), secrets.token_bytes(32)
    shares = shamir.split(secret, (1, 2, 3), 3)
    weights = shamir.coefficients((1, 2, 3))
    known = sum(weights[point] * int.from_bytes(shares[point], "big") for point in (1, 2))
    third = (int.from_bytes(other, "big") - known) * pow(weights[3], -1, shamir.PRIME) % shamir.PRIME
    assert shamir.reconstruct({1: shares[1], 2: shares[2], 3: third.to_bytes(33, "big")}, 3) == other


def test_too_few_and_foreign_shares_are_named() -> None:
    shares = shamir.split(bytes(32), (1, 2, 3), 2)
    with pytest.raises(ProtocolError, match="1 shares of a secret of which 2"):
        shamir.reconstruct({1: shares[1]}, 2)
    beyond = (shamir.PRIME - 1).to_bytes(33, "big")
    with pytest.raises(ProtocolError, match="belong to no secret"):
        shamir.reconstruct({1: beyond, 2: beyond}, 2)


def test_the_modulus_is_prime() -> None:
    """By Fermat's little theorem to some bases, as a guard against a slip of the pen."""
    assert all(pow(base, shamir.PRIME - 1, shamir.PRIME) == 1 for base in (2, 3, 5, 7, 11, 13, 17, 19, 23))
