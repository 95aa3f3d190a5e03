"""Budgets: asked before anything leaves, for each record alone and for the silo; and kept over restarts."""

from __future__ import annotations

import math

import pytest

from isthmus.errors import BudgetExhausted
from isthmus.privacy.accountant import Account
from isthmus.privacy.budget import Budget
from isthmus.privacy.events import ALL, Charge, Release
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import PrivacySection

DELTA = 1e-5
ONE = Account(1.0).epsilon(DELTA).value
"""Epsilon of a charge of 1."""


def release(*charges: Charge, path: str = "forward") -> Release:
    return Release(path, 1, 1, 1, 1.0, 1.0, 1, charges=charges)  # type: ignore[arg-type]


def about(*records: str, budgets: tuple[float, ...] | None = None) -> Subjects:
    return Subjects(records, (1,) * len(records), None, budgets)


def budget_of(record: float | None = None, silo: float | None = None, history: tuple[Release, ...] = ()) -> Budget:
    return Budget(PrivacySection(delta=DELTA, record_epsilon=record, silo_epsilon=silo), history)


def test_without_limits_everything_leaves() -> None:
    budget = Budget()
    event = release(Charge("a", math.inf))
    budget.require(event, about("a"))
    budget.note(event)
    budget.require(event, about("a"))
    assert budget.epsilon == math.inf
    assert budget.affordable([event.charges], about("a")) == [True]


def test_the_last_release_that_fits_leaves_and_the_next_is_refused_by_name() -> None:
    budget = budget_of(record=ONE)
    quarter = release(Charge("a", 0.25))
    for _ in range(4):
        budget.require(quarter, about("a"))
        budget.note(quarter)
    assert budget.epsilon == pytest.approx(ONE)
    for _ in range(2):
        with pytest.raises(BudgetExhausted, match="another forward release of record a") as caught:
            budget.require(quarter, about("a"))
    assert "privacy.record_epsilon" in caught.value.remedy
    assert budget.epsilon == pytest.approx(ONE)
    budget.require(release(Charge("b", 1.0)), about("b"))


def test_only_the_spent_ones_are_named() -> None:
    budget = budget_of(record=ONE)
    budget.note(release(*(Charge(f"spent{number}", 0.9) for number in range(7)), Charge("fresh", 0.1)))
    event = release(*(Charge(f"spent{number}", 0.2) for number in range(7)), Charge("fresh", 0.2))
    with pytest.raises(BudgetExhausted, match="spent4 and 2 more") as caught:
        budget.require(event, about(*(f"spent{number}" for number in range(7)), "fresh"))
    assert "fresh" not in caught.value.message


def test_a_record_may_have_less_than_the_recipe_gives() -> None:
    for budget, record, own in ((budget_of(record=10 * ONE), 10 * ONE, ONE), (budget_of(), None, ONE)):
        budget.require(release(Charge("a", 1.0)), about("a", budgets=(own,)))
        with pytest.raises(BudgetExhausted):
            budget.require(release(Charge("a", 1.1)), about("a", budgets=(own,)))
        budget.require(release(Charge("a", 1.1)), about("a", budgets=(math.inf,)))
        told = budget.affordable([[Charge("a", 1.1)], [Charge("b", 1.1)]], about("a", "b", budgets=(own, math.inf)))
        assert told == [False, True], record
    with pytest.raises(BudgetExhausted):
        budget_of(record=ONE).require(release(Charge("a", 1.1)), about("a", budgets=(5 * ONE,)))


def test_of_two_budgets_for_one_record_the_smaller_counts() -> None:
    with pytest.raises(BudgetExhausted):
        budget_of().require(release(Charge("a", 1.1)), about("a", "a", budgets=(5 * ONE, ONE)))


def test_the_silo_has_a_budget_of_its_own_which_updates_spend_too() -> None:
    budget = budget_of(silo=ONE)
    budget.note(release(Charge("a", 0.4)))
    budget.note(release(Charge(ALL, 0.4), path="update"))
    with pytest.raises(BudgetExhausted, match="the silo's privacy budget") as caught:
        budget.require(release(Charge("b", 0.3)), about("b"))
    assert "privacy.silo_epsilon" in caught.value.remedy
    budget.require(release(Charge("b", 0.2)), about("b"))


def test_updates_do_not_count_for_a_record() -> None:
    budget = budget_of(record=ONE)
    budget.note(release(Charge(ALL, 9.0), path="update"))
    budget.require(release(Charge("a", 1.0)), about("a"))
    budget.require(release(Charge(ALL, 9.0), path="update"), about(ALL))


def test_affordable_counts_those_before() -> None:
    budget = budget_of(record=ONE, silo=Account(2.0).epsilon(DELTA).value)
    half = [Charge("a", 0.3), Charge("a", 0.3)]
    other = [Charge("b", 0.9)]
    assert budget.affordable([half, half, other, other], about("a", "a", "b", "b")) == [True, False, True, False]
    assert budget.affordable([half, other, [Charge("c", 0.9)]], about("a", "b", "c")) == [True, True, False]
    assert budget.epsilon == 0.0


def test_what_is_affordable_is_borne() -> None:
    budget = budget_of(record=ONE)
    charges = [Charge("a", 0.7), Charge("a", 0.3)]
    assert budget.affordable([charges], about("a")) == [True]
    for charge in charges:
        budget.require(release(charge), about("a"))
        budget.note(release(charge))


def test_history_counts() -> None:
    budget = budget_of(record=ONE, history=(release(Charge("a", 0.9)),))
    with pytest.raises(BudgetExhausted):
        budget.require(release(Charge("a", 0.2)), about("a"))
