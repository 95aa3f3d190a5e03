"""Shamir's secret sharing (1979): any ``threshold`` shares of a secret reconstruct it, fewer reveal nothing about it.

Secrets are 32 bytes; the arithmetic is modulo the smallest prime above 2^256.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

from isthmus.errors import ProtocolError

PRIME = 2**256 + 297
SECRET, SHARE = 32, 33
"""Bytes of a secret and of a share."""


def split(secret: bytes, points: Iterable[int], threshold: int) -> dict[int, bytes]:
    """A share of the secret for each point.

    Args:
        points: distinct, from 1: a share at 0 would be the secret.
    """
    points = list(points)
    assert len(secret) == SECRET
    assert len(set(points)) == len(points) >= threshold > 0 not in points
    terms = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {point: _at(terms, point).to_bytes(SHARE, "big") for point in points}


def reconstruct(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret of which these are shares, by their points.

    Raises:
        ProtocolError: they are too few, or no shares of one secret.
    """
    if len(shares) < threshold:
        raise ProtocolError(
            f"{len(shares)} shares of a secret of which {threshold} are needed", remedy="wait for more silos"
        )
    chosen = dict(sorted(shares.items())[:threshold])
    weights = coefficients(tuple(chosen))
    total = sum(weights[point] * int.from_bytes(share, "big") for point, share in chosen.items()) % PRIME
    if total >= 2 ** (8 * SECRET):
        raise ProtocolError("shares that belong to no secret", remedy="leave out the silo that altered its share")
    return total.to_bytes(SECRET, "big")


def coefficients(points: tuple[int, ...]) -> dict[int, int]:
    """Lagrange's coefficients at zero."""
    weights = {}
    for point in points:
        above, below = 1, 1
        for other in points:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        weights[point] = above * pow(below, -1, PRIME) % PRIME
    return weights


def _at(terms: list[int], point: int) -> int:
    value = 0
    for term in reversed(terms):
        value = (value * point + term) % PRIME
    return value
