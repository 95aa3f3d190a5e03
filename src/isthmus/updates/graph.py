"""Who holds shares of whose secrets in a large masked sum: as few neighbours as a stated share of colluders allows.

After Bell et al. (CCS 2020), for members around a circle in an order that nobody chose: each has the same number of
neighbours on either side. The numbers follow from tails of the hypergeometric distribution.
"""

from __future__ import annotations

from functools import lru_cache
from math import exp, floor, lgamma
from typing import NamedTuple

COLLUDING = 1 / 3
"""Share of a sum's members that may collude with its aggregator: fewer than these."""
DROPPING = 1 / 20
"""Share of a large sum's members whose loss it survives, whoever they are."""
ERROR = 2.0**-80
"""Probability that one order around the circle fails at what it promises: 2^-40 for an aggregator that looks through
2^40 orders before it names one."""


class Neighbourhood(NamedTuple):
    """How many neighbours a member has, and how many holders of its shares must reveal theirs."""

    degree: int
    threshold: int


def quorum(members: int) -> int:
    """More than two thirds: any two such groups have an honest member in common if less than a third collude."""
    return 2 * members // 3 + 1


@lru_cache
def sparse_graph(
    members: int, colluding: float = COLLUDING, dropping: float = DROPPING, error: float = ERROR
) -> Neighbourhood:
    """The smallest neighbourhoods with which a sum of this size is safe; all members where no smaller ones are.

    Safe means, but for a probability of ``error``: colluders among a member's neighbours never reconstruct a secret
    alone, and no group of members is cut off, with its sum to be read by itself. A group can only be cut off by
    removing all neighbours on one side of a member; then its own side and the colluders on the other must be too few
    to reveal its seed. And a random share ``dropping`` of all members can be lost.
    """
    others, each = members - 1, error / (4 * members)
    for degree in range(2, others, 2):
        beside = highest(others, floor(colluding * members), degree // 2, each)
        around = highest(others, floor(colluding * members), degree, each)
        threshold = max(quorum(degree + 1), degree // 2 + beside + 2, around + 1)
        if threshold + highest(others, floor(dropping * members), degree, each) <= degree + 1:
            return Neighbourhood(degree, threshold)
    return Neighbourhood(others, quorum(members))


def highest(population: int, marked: int, drawn: int, error: float) -> int:
    """The smallest number that the count of marked ones among those drawn exceeds with at most this probability."""
    total = 0.0
    for count in range(min(marked, drawn), max(0, marked + drawn - population) - 1, -1):
        ways = _log_comb(marked, count) + _log_comb(population - marked, drawn - count)
        total += exp(ways - _log_comb(population, drawn))
        if total > error:
            return count
    return max(0, marked + drawn - population)


def _log_comb(whole: int, part: int) -> float:
    return lgamma(whole + 1) - lgamma(part + 1) - lgamma(whole - part + 1)
