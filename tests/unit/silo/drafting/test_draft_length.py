"""The length of a draft: a pure function of acceptance, round trip and costs; and what measures them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.silo.drafting.draft_length import MAX_DRAFT, AcceptanceRate, Costs, DraftLength, LinearFit, worthwhile

acceptances = st.floats(0.01, 0.99)
times = st.floats(0.001, 2.0)


def best_length(acceptance: float, costs: Costs, most: int = MAX_DRAFT) -> int:
    """How many tokens to draft if each is accepted with this probability; 0 when drafting does not pay."""
    length, reach, tokens, seconds = 0, acceptance, 1.0, costs.round_trip + costs.per_verified_token
    cost = costs.per_drafted_token + costs.per_verified_token
    while length < most and worthwhile(reach, tokens, seconds, cost):
        length, tokens, seconds, reach = length + 1, tokens + reach, seconds + cost, reach * acceptance
    return length


def rate(acceptance: float, costs: Costs, length: int) -> float:
    """Expected tokens a second of a draft of this length, the slow way."""
    tokens = sum(acceptance**number for number in range(length + 1))
    return tokens / (costs.round_trip + costs.per_verified_token * (length + 1) + costs.per_drafted_token * length)


@given(acceptances, times, times, times)
def test_no_other_length_is_faster(acceptance: float, round_trip: float, verified: float, drafted: float) -> None:
    costs = Costs(round_trip, verified, drafted)
    best = max(rate(acceptance, costs, length) for length in range(MAX_DRAFT + 1))
    assert rate(acceptance, costs, best_length(acceptance, costs)) == pytest.approx(best)


@given(acceptances, times, times, times)
def test_grows_with_acceptance_and_round_trip(
    acceptance: float, round_trip: float, verified: float, drafted: float
) -> None:
    costs = Costs(round_trip, verified, drafted)
    assert best_length(min(0.995, acceptance * 1.2), costs) >= best_length(acceptance, costs)
    assert best_length(acceptance, Costs(2 * round_trip, verified, drafted)) >= best_length(acceptance, costs)


def test_longer_ways_ask_for_longer_drafts() -> None:
    lengths = [best_length(0.7, Costs(trip, 0.002, 0.02)) for trip in (0.001, 0.02, 0.08, 0.3, 2.0)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert 1 < lengths[2] < lengths[4]


def test_none_when_drafting_does_not_pay() -> None:
    assert best_length(0.3, Costs(round_trip=0.01, per_verified_token=0.001, per_drafted_token=0.02)) == 0
    assert best_length(0.0, Costs(1.0, 0.001, 0.001)) == 0


def test_a_share_follows_what_happens_lately() -> None:
    share = AcceptanceRate(3.0, 4.0)
    assert share.value == 0.75
    for _ in range(200):
        share.note(False)
    assert share.value < 0.05
    for _ in range(200):
        share.note(True)
    assert share.value > 0.95


def test_a_line_is_found_in_trips_of_unlike_length() -> None:
    line = LinearFit()
    for tokens in itertools.islice(itertools.cycle((1, 3, 7)), 30):
        line.note(tokens, 0.08 + 0.005 * tokens)
    base, slope = line.fit(0.01)
    assert base == pytest.approx(0.08, rel=1e-3)
    assert slope == pytest.approx(0.005, rel=1e-2)


def test_trips_of_one_length_still_give_costs() -> None:
    draft_length = DraftLength()
    assert best_length(0.5, draft_length.costs) > 0, "nothing measured yet: try"
    for _ in range(10):
        draft_length.note_trip(1, 0.1)
        draft_length.note_draft(2, 0.04)
    costs = draft_length.costs
    assert costs.per_drafted_token == pytest.approx(0.02)
    assert costs.round_trip + costs.per_verified_token == pytest.approx(0.1)
    assert costs.per_verified_token > 0
