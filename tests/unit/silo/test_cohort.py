"""A cohort: the silos that one sums with, by its own recipe; ``tests/hostile/test_lying_plans.py`` has the attacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.errors import ProtocolError
from isthmus.silo.cohort import Cohort
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import make_recipe

EDGES = [
    {"name": "left", "address": "localhost:1", "silos": ["a", "b", "c"], "sibling": "right"},
    {"name": "right", "address": "localhost:2", "silos": ["d", "e", "f", "g"], "minimum": 2},
]


def plan(participants: str, keys: str) -> pb.Plan:
    return pb.Plan(participants=participants, keys={name: pb.SumKeys() for name in keys})


def test_of_an_edge_it_has_the_silos_that_turn_to_it_and_never_fewer_than_three() -> None:
    tree = make_recipe(Path("none"), silos=tuple("abcdefg"), edge=EDGES).tree
    assert Cohort.of(tree.node("left")) == Cohort(frozenset("abc"), 3)
    assert Cohort.of(tree.node("right")) == Cohort(frozenset("abcdefg"), 3)


def test_a_plan_of_it_passes_and_may_have_participants_of_other_cohorts() -> None:
    Cohort(frozenset("abcd"), 3).check(plan("abcdxyz", "abc"))


@pytest.mark.parametrize(
    ("participants", "keys", "reason"),
    [
        ("abcx", "abcx", "'x', which is no silo of this cohort"),
        ("abc", "abcd", "'d', which does not take part"),
        ("abcd", "ab", "2 silos in a plan's sum, the recipe needs 3"),
    ],
)
def test_other_plans_are_refused(participants: str, keys: str, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        Cohort(frozenset("abcd"), 3).check(plan(participants, keys))


def test_a_silo_that_the_authority_added_may_be_in_a_sum_and_no_other() -> None:
    cohort = Cohort(frozenset("abcd"), 3)
    cohort.check(plan("abcx", "abcx"), {"x"})
    with pytest.raises(ProtocolError, match="'y', which is no silo of this cohort"):
        cohort.check(plan("abcxy", "abcxy"), {"x"})
