"""Covering lists: few cases in which every value of a factor meets every value of every other factor."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

Pair = tuple[str, int, str, int]
"""Two factors, by name, and the place of a value of each."""


def pairwise(*, complete: Sequence[str] = (), **factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Cases, each with one value a factor in the given order, that hold every pair of values of every two factors.

    The list is the same in every process. It is chosen greedily, case by case, and so short, if not the shortest.

    Args:
        complete: factors of which every combination is to occur, not only every pair.
        factors: the values of each factor, in any number.

    Raises:
        ValueError: a factor without values, or a complete one that is none of the factors.
    """
    values = {name: list(given) for name, given in factors.items()}
    for name in [*(name for name, given in values.items() if not given), *(set(complete) - values.keys())]:
        raise ValueError(f"the factor {name!r} has no values")
    open_pairs = _pairs(values)
    cases = []
    begun: Iterable[tuple[int, ...]] = itertools.product(*(range(len(values[name])) for name in complete))
    for places in begun if complete else ():
        cases.append(_filled(dict(zip(complete, places, strict=True)), values, open_pairs))
        open_pairs -= _pairs_of(cases[-1])
    while open_pairs:
        first, one, second, other = min(open_pairs)
        cases.append(_filled({first: one, second: other}, values, open_pairs))
        open_pairs -= _pairs_of(cases[-1])
    return [tuple(values[name][case[name]] for name in values) for case in cases]


def _filled(case: dict[str, int], values: dict[str, list[Any]], open_pairs: set[Pair]) -> dict[str, int]:
    """The case with the factors that it lacks, each with the value that covers most open pairs."""
    filled = dict(case)
    for name, given in values.items():
        if name not in filled:
            gains = [len(_pairs_of({**filled, name: place}) & open_pairs) for place in range(len(given))]
            filled[name] = gains.index(max(gains))
    return filled


def _pairs(values: dict[str, list[Any]]) -> set[Pair]:
    return {
        (first, one, second, other)
        for first, second in itertools.combinations(sorted(values), 2)
        for one in range(len(values[first]))
        for other in range(len(values[second]))
    }


def _pairs_of(case: dict[str, int]) -> set[Pair]:
    return {(one, case[one], other, case[other]) for one, other in itertools.combinations(sorted(case), 2)}
