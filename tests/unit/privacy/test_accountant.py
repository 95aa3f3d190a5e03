"""The accountant: what adds up, what does not, and which bound is taken when."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.privacy.accountant import DISTINCT_PURE, LARGEST_TABULATED, Account, Accountant, worst
from isthmus.privacy.events import ALL, Charge, Release

DELTA = 1e-5
MODEST = st.builds(Charge, st.just("a"), st.floats(0, 4))


def release(*charges: Charge, path: str = "forward") -> Release:
    return Release(path, 1, 1, 1, 1.0, 1.0, 1, charges=charges)  # type: ignore[arg-type]


def account(*charges: Charge) -> Account:
    found = Account()
    for charge in charges:
        found = found.plus(charge)
    return found


def test_nothing_costs_nothing() -> None:
    accountant = Accountant(DELTA)
    assert accountant.worst().value == accountant.quick_worst() == accountant.median() == 0.0
    assert Account().epsilon(DELTA).value == 0.0
    assert Account().within(1e-9, DELTA)


def test_records_are_disjoint_and_the_silo_is_their_sum() -> None:
    charges = [Charge("a", 0.5), Charge("b", 0.25), Charge("a", 0.5), Charge("c", 0.1)]
    accountant = Accountant(DELTA, [release(charge) for charge in charges])
    assert {name: one.gaussian for name, one in accountant.records.items()} == {"a": 1.0, "b": 0.25, "c": 0.1}
    assert accountant.worst() == Account(1.0).epsilon(DELTA)
    assert accountant.quick_worst() == accountant.worst().value
    assert accountant.median() == Account(0.25).epsilon(DELTA).value
    assert accountant.silo.gaussian == pytest.approx(1.35)


def test_updates_are_about_no_single_record() -> None:
    accountant = Accountant(DELTA, [release(Charge("a", 0.5)), release(Charge(ALL, 2.0), path="update")])
    assert set(accountant.records) == {"a"}
    assert accountant.updates == Account(2.0)
    assert accountant.silo == Account(2.5)
    assert accountant.records["a"].joined(accountant.updates) == Account(2.5)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20), st.randoms())
def test_order_does_not_matter(costs: list[float], random: object) -> None:
    shuffled = list(costs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = (account(*(Charge("a", cost) for cost in order)) for order in (costs, shuffled))
    assert one.epsilon(DELTA).value == pytest.approx(other.epsilon(DELTA).value)


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6), st.floats(1e-12, 0.5))
def test_more_costs_more(first: float, second: float, delta: float) -> None:
    """Up to the rounding of the root that is sought: charges may be neighbouring floats."""
    low, high = sorted([first, second])
    cheap, dear = Account(low).epsilon(delta).value, Account(high).epsilon(delta).value
    assert cheap <= dear * (1 + 1e-9) + 1e-9
    assert Account(low).epsilon(min(0.9, delta * 2)).value <= cheap * (1 + 1e-9) + 1e-9


@given(st.floats(1e-3, 1e8), st.sampled_from([1e-9, 1e-5, 0.01]))
def test_a_limit_is_met_exactly(cost: float, delta: float) -> None:
    epsilon = Account(cost).epsilon(delta).value
    if epsilon > 1e-3:
        assert Account(cost).within(epsilon * (1 + 1e-6), delta)
        assert not Account(cost * 1.001).within(epsilon, delta)


@pytest.mark.parametrize("charge", [Charge("a", math.inf), Charge("a", 0.0, math.inf)])
def test_one_unbounded_release_has_no_epsilon_and_says_why(charge: Charge) -> None:
    found = account(Charge("a", 0.1), charge)
    assert found.epsilon(DELTA).value == found.bound(DELTA) == math.inf
    assert "not clipped" in found.epsilon(DELTA).note
    assert not found.within(1e9, DELTA)
    assert found.within(math.inf, DELTA)


def test_pure_epsilons_alone_add_up_or_do_better() -> None:
    few, many = account(*[Charge("a", 0.0, 0.5)] * 2), account(*[Charge("a", 0.0, 0.05)] * 400)
    assert few.bound(DELTA) == pytest.approx(1.0)
    assert few.epsilon(DELTA).value <= 1.0
    assert many.epsilon(DELTA).value < 0.5 * many.bound(DELTA)
    assert many.epsilon(DELTA).method == "pld"
    assert many.within(10.0, DELTA)  # though the sum is 20


def test_what_cannot_be_tabulated_falls_back_and_says_so() -> None:
    mixed = account(Charge("a", 400.0), *[Charge("a", 0.0, 0.5)] * 300)
    assert mixed.bound(DELTA) > LARGEST_TABULATED
    found = mixed.epsilon(DELTA)
    assert (found.method, "too large" in found.note) == ("rdp", True)
    assert found.value < mixed.bound(DELTA)
    coarse = account(Charge("a", 1.0), Charge("a", 0.0, 2000.0))
    assert coarse.epsilon(DELTA).method == "sum"
    assert coarse.epsilon(DELTA).value == coarse.bound(DELTA)


def test_many_kinds_of_pure_epsilons_are_rounded_up() -> None:
    pures = [1.0 + number / 977 for number in range(5 * DISTINCT_PURE)]
    found = account(*(Charge("a", 0.0, pure) for pure in pures))
    assert len(found.pures) <= DISTINCT_PURE + 1
    assert sum(count for _, count in found.pures) == len(pures)
    assert sum(pures) <= found.bound(DELTA) <= 1.1 * sum(pures)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.01, 0.3), st.floats(0, 0.3)), min_size=1, max_size=5))
def test_the_worst_record_is_the_worst(told: list[tuple[str, float, float]]) -> None:
    accountant = Accountant(DELTA, [release(Charge(*one)) for one in told])
    each = [one.epsilon(DELTA).value for one in accountant.records.values()]
    assert accountant.worst().value == worst(accountant.records.values(), DELTA).value == max(each)
    assert accountant.quick_worst() >= max(each) * (1 - 1e-9)
