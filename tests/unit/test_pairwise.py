"""The covering lists of ``tests.pairwise`` leave no pair out, and are shorter than the product."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pairwise import pairwise

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def factors(sizes: list[int]) -> dict[str, list[int]]:
    return {f"f{number}": list(range(size)) for number, size in enumerate(sizes)}


@given(sizes=SIZES, complete=st.integers(0, 3))
def test_every_pair_of_values_occurs_and_the_complete_factors_whole(sizes: list[int], complete: int) -> None:
    given_factors = factors(sizes)
    names = list(given_factors)[:complete]
    cases = pairwise(complete=names, **given_factors)
    for first, second in itertools.combinations(range(len(sizes)), 2):
        assert {(case[first], case[second]) for case in cases} == set(
            itertools.product(range(sizes[first]), range(sizes[second]))
        )
    if names:
        assert {case[: len(names)] for case in cases} == set(itertools.product(*map(range, sizes[: len(names)])))
    assert len(cases) <= max(math.prod(sizes), 1)


def test_it_is_short_and_the_same_each_time() -> None:
    many = {name: range(4) for name in "abcdef"}
    assert pairwise(**many) == pairwise(**many)
    assert len(pairwise(**many)) < 40 < 4**6


def test_complete_factors_take_the_others_along() -> None:
    cases = pairwise(complete=("family", "cut"), family="abc", cut=[(1, 1), (2, 1)], side=["left", "right"])
    assert len(cases) == 6
    assert cases[0] == ("a", (1, 1), "left")


@pytest.mark.parametrize("bad", [{"a": []}, {"complete": ("b",), "a": [1]}])
def test_a_factor_without_values_is_refused(bad: dict[str, list[int]]) -> None:
    with pytest.raises(ValueError, match="has no values"):
        pairwise(**bad)  # type: ignore[arg-type]
