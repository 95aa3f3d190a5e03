"""Neighbourhoods of large sums: what they promise, counted out and drawn."""

from __future__ import annotations

import random
from math import comb

import pytest

from isthmus.updates.graph import highest, quorum, sparse_graph


@pytest.mark.parametrize(
    ("members", "expected"), [(3, 3), (4, 3), (5, 4), (6, 5), (9, 7), (10, 7), (50, 34), (128, 86)]
)
def test_a_quorum_is_more_than_two_thirds(members: int, expected: int) -> None:
    assert quorum(members) == expected
    assert 3 * expected > 2 * members >= 3 * (expected - 1)


def test_two_quorums_have_an_honest_member_in_common() -> None:
    for members in range(3, 400):
        colluders = (members - 1) // 3
        assert 2 * quorum(members) - members > colluders


@pytest.mark.parametrize("error", [0.5, 0.01, 2.0**-40])
def test_tails_are_those_counted_by_whole_numbers(error: float) -> None:
    for population, marked, drawn in [(20, 5, 7), (199, 66, 66), (199, 10, 132), (50, 50, 9), (30, 25, 20), (9, 0, 4)]:
        found = highest(population, marked, drawn, error)
        tail = [
            sum(
                comb(marked, count) * comb(population - marked, drawn - count)
                for count in range(above + 1, min(marked, drawn) + 1)
            )
            / comb(population, drawn)
            for above in (found, found - 1)
        ]
        assert tail[0] <= error
        assert found == max(0, marked + drawn - population) or tail[1] > error


@pytest.mark.parametrize("members", [129, 200, 1000])
def test_a_large_sum_is_safe_in_drawn_orders(members: int) -> None:
    degree, threshold = sparse_graph(members)
    assert degree < members - 1
    draw = random.Random(members)
    for _ in range(20):
        colluders = [number < members // 3 for number in range(members)]
        draw.shuffle(colluders)
        for place in range(members):
            after, before = (
                sum(colluders[(place + way * step) % members] for step in range(1, degree // 2 + 1)) for way in (1, -1)
            )
            assert after + before < threshold
            assert max(after, before) + degree // 2 + 1 < threshold
    assert threshold <= 0.95 * (degree + 1)


def test_small_sums_and_many_colluders_leave_no_sparse_graph() -> None:
    assert sparse_graph(6) == (5, 5)
    assert sparse_graph(200, 0.9) == (199, 134)
