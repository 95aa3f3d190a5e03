"""What a silo multiplies its own weight by: the papers' weights, within bounds; and in whole federations."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from isthmus.recipe import FairnessSection
from isthmus.silo.fairness import factor, starting_loss

KINDS = ("q-ffl", "tilted", "agnostic")
LOSSES = st.floats(0.0, 1e6)
SECTIONS = st.builds(
    FairnessSection,
    kind=st.sampled_from(KINDS),
    strength=st.floats(1e-3, 1e3),
    reference=st.floats(1e-3, 1e3),
    bound=st.floats(1.0, 1e3),
)


@given(SECTIONS, st.lists(LOSSES, min_size=1, max_size=8))
def test_a_factor_never_leaves_its_bounds(section: FairnessSection, losses: list[float]) -> None:
    before = 1.0
    for loss in losses:
        before = factor(section, loss, before)
        assert 1 / section.bound <= before <= 1.0


@given(SECTIONS, LOSSES, LOSSES, st.floats(0.0, 1.0))
def test_who_does_worse_is_never_lighter(section: FairnessSection, one: float, other: float, part: float) -> None:
    before = section.bound**-part
    low, high = sorted((one, other))
    assert factor(section, low, before) <= factor(section, high, before)


@given(st.floats(0.1, 4.0), st.lists(st.floats(0.5, 2.0), min_size=2, max_size=6))
def test_within_the_bounds_weights_are_in_the_papers_proportions(strength: float, losses: list[float]) -> None:
    """λ_k / Σλ of each paper's own formula, whatever the reference."""
    own = {
        "q-ffl": [loss**strength for loss in losses],
        "tilted": [math.exp(strength * loss) for loss in losses],
        "agnostic": [math.exp(strength * loss) for loss in losses],
    }
    for kind, expected in own.items():
        section = FairnessSection(kind=kind, strength=strength, reference=2.0, bound=1e6)  # type: ignore[arg-type]
        factors = [factor(section, loss) for loss in losses]
        assert [one / sum(factors) for one in factors] == pytest.approx([one / sum(expected) for one in expected])


@given(st.lists(st.floats(0.0, 2.0), min_size=1, max_size=6))
def test_agnostic_goes_on_from_round_to_round(losses: list[float]) -> None:
    section = FairnessSection(kind="agnostic", strength=0.5, reference=2.0, bound=1e9)
    before = 1.0
    for loss in losses:
        before = factor(section, loss, before)
    assert before == pytest.approx(math.exp(0.5 * sum(loss - 2.0 for loss in losses)))


def test_agnostic_comes_back_from_its_bound_at_once() -> None:
    section = FairnessSection(kind="agnostic", strength=1.0, reference=2.0, bound=4.0)
    low = 1.0
    for _ in range(100):
        low = factor(section, 0.0, low)
    assert low == pytest.approx(0.25)
    assert factor(section, 2.0 + math.log(2), low) == pytest.approx(0.5)


@given(SECTIONS, st.floats(0.25, 1.0))
def test_without_a_loss_nothing_changes(section: FairnessSection, before: float) -> None:
    assume(section.bound >= 4)
    assert factor(section, None, before) == before


def test_without_fairness_all_keep_their_weight() -> None:
    assert factor(FairnessSection(), 0.01) == 1.0


def test_the_loss_at_the_start_is_that_of_the_first_steps_with_rows() -> None:
    assert starting_loss([None, 3.0, 2.0, None, 1.0, 0.1, 0.1]) == 2.0
    assert starting_loss([3.0]) == 3.0
    assert starting_loss([None, None]) is None
    assert starting_loss([]) is None
