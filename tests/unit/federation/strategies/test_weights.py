"""What contributions count for: against slow sums over single numbers, and within bounds whatever anybody sends."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.federation.contribution import Contribution
from isthmus.federation.strategies.strategy import Strategy
from isthmus.federation.strategies.weights import FLOOR, History, agreement, bounded, merit, shares, steadiness
from isthmus.recipe import FederationSection

COMPUTED = ("agreement", "inverse-variance", "quality")


@st.composite
def rounds(draw: st.DrawFn) -> torch.Tensor:
    """Changes of a few silos, fp32, some of them far larger than others."""
    silos, size = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale_N = 10.0 ** torch.randint(-3, 3, (silos, 1), generator=generator)
    return torch.randn(silos, size, generator=generator) * scale_N + draw(st.sampled_from([0.0, 1.0]))


def section(kind: str, bound: float = 2.0, masks: bool = False) -> FederationSection:
    return FederationSection.model_validate({"weights": {"kind": kind, "bound": bound}, "secure": masks})


def contributions(
    changes_NP: torch.Tensor, weights: Sequence[float] | None = None, qualities: Sequence[float] | None = None
) -> list[Contribution]:
    count = len(changes_NP)
    told = zip(weights or [1.0] * count, changes_NP, qualities or [1.0] * count, strict=True)
    return [
        Contribution(f"s{number}", weight, {"x": row}, quality) for number, (weight, row, quality) in enumerate(told)
    ]


# --- scores


@given(rounds())
def test_agreement_is_the_cosine_with_the_others_mean(changes_NP: torch.Tensor) -> None:
    rows = [[float(value) for value in change_P] for change_P in changes_NP]
    for number, score in enumerate(agreement(changes_NP).tolist()):
        others = rows[:number] + rows[number + 1 :]
        if not others:
            assert score == 1.0
            continue
        mean = [math.fsum(column) / len(others) for column in zip(*others, strict=True)]
        lengths = math.hypot(*rows[number]) * math.hypot(*mean)
        cosine = math.fsum(a * b for a, b in zip(rows[number], mean, strict=True)) / lengths
        assert score == pytest.approx(min(1.0, max(FLOOR, cosine)), rel=1e-6)


@given(rounds())
def test_steadiness_is_one_over_the_variance_around_the_mean(changes_NP: torch.Tensor) -> None:
    rows = [[float(value) for value in change_P] for change_P in changes_NP]
    mean = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    variances = [math.fsum((a - b) ** 2 for a, b in zip(row, mean, strict=True)) for row in rows]
    expected = [1.0 if not variance else max(FLOOR, min(variances) / variance) for variance in variances]
    if len(rows) > 1:
        assert steadiness(changes_NP).tolist() == pytest.approx(expected, rel=1e-5)
    else:
        assert steadiness(changes_NP).tolist() == [1.0]


def test_equal_changes_are_equally_steady_and_agree() -> None:
    changes_NP = torch.ones(3, 4)
    assert steadiness(changes_NP).tolist() == agreement(changes_NP).tolist() == [1.0] * 3


def test_who_learned_the_opposite_weighs_the_least() -> None:
    changes_NP = torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, -0.1], [-1.0, 0.0]])
    scores = agreement(changes_NP).tolist()
    assert scores[3] == FLOOR
    assert all(score > 0.9 for score in scores[:3])


def test_merit_is_quality_times_the_part_of_the_rounds() -> None:
    history = History()
    for names in (["s0", "s1"], ["s0"], ["s0", "s1"]):
        history.note(names)
    scores = merit(contributions(torch.zeros(3, 1), qualities=[0.5, 0.8, 1.0]), history).tolist()
    assert scores == pytest.approx([0.5 * 4 / 4, 0.8 * 3 / 4, 1.0 * 1 / 4])
    again = History()
    again.load_state_dict(history.state_dict())
    assert again.participation("s1") == history.participation("s1") == 3 / 4
    assert merit(contributions(torch.zeros(1, 1), qualities=[0.0]), history).tolist() == [FLOOR]


# --- shares


@given(st.lists(st.floats(FLOOR, 1.0), min_size=1, max_size=9), st.floats(1.0, 12.0))
def test_nobody_has_more_than_the_bound_and_the_rest_is_in_proportion(scores: list[float], bound: float) -> None:
    shares_N = bounded(torch.tensor(scores, dtype=torch.float64), bound).tolist()
    most = bound / len(scores)
    assert sum(shares_N) == pytest.approx(1.0)
    assert all(0 < share <= most * (1 + 1e-9) for share in shares_N)
    free = [(share, score) for share, score in zip(shares_N, scores, strict=True) if share < most * (1 - 1e-9)]
    for share, score in free:
        assert share / free[0][0] == pytest.approx(score / free[0][1])
    for (one, score), (other, beside) in zip(zip(shares_N, scores, strict=True), free, strict=False):
        assert one >= other * (1 - 1e-9) or score < beside


def test_what_is_beyond_the_bound_goes_to_the_others() -> None:
    scores_N = torch.tensor([0.8, 0.1, 0.1, 0.2], dtype=torch.float64)
    assert bounded(scores_N, 2.0).tolist() == pytest.approx([0.5, 0.125, 0.125, 0.25])
    assert bounded(scores_N, 1.0).tolist() == pytest.approx([0.25] * 4)
    assert bounded(scores_N, 9.0).tolist() == pytest.approx([0.8 / 1.2, 0.1 / 1.2, 0.1 / 1.2, 0.2 / 1.2])


@given(rounds(), st.floats(1.0, 8.0), st.data())
def test_whatever_silos_send_their_shares_are_bounded(
    changes_NP: torch.Tensor, bound: float, data: st.DataObject
) -> None:
    count = len(changes_NP)
    claimed = data.draw(st.lists(st.floats(1e-6, 1e12), min_size=count, max_size=count))
    qualities = data.draw(st.lists(st.floats(0.0, 1.0), min_size=count, max_size=count))
    sent = contributions(changes_NP, claimed, qualities)
    for kind in COMPUTED:
        shares_N = shares(section(kind, bound).weights, sent, changes_NP, History())
        assert float(shares_N.sum()) == pytest.approx(1.0)
        assert float(shares_N.min()) > 0
        assert float(shares_N.max()) <= bound / count * (1 + 1e-9)


def test_what_a_silo_claims_counts_as_the_recipe_says() -> None:
    changes_NP = torch.zeros(3, 2)
    sent = contributions(changes_NP, [6.0, 3.0, 0.5])
    cases = {
        section("examples"): [6 / 9.5, 3 / 9.5, 0.5 / 9.5],
        section("equal"): [0.4, 0.4, 0.2],
        section("equal", masks=True): [6 / 9.5, 3 / 9.5, 0.5 / 9.5],  # cohorts, whose shares add up
    }
    for asked, expected in cases.items():
        strategy = Strategy(asked)
        strategy.next({"x": torch.zeros(2)}, sent)
        assert list(strategy.shares.values()) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["examples", "equal", *COMPUTED])
def test_one_alone_is_the_whole_change(kind: str) -> None:
    strategy = Strategy(section(kind))
    base = {"x": torch.ones(4)}
    (alone,) = contributions(torch.tensor([[0.5, -0.5, 0.0, 2.0]]), [3.0])
    assert torch.equal(strategy.next(base, [alone])["x"], base["x"] + alone.change["x"])
    assert strategy.shares == {"s0": 1.0}
    strategy.next(base, [])
    assert strategy.shares == {}


@pytest.mark.parametrize("kind", COMPUTED)
def test_the_mean_is_that_of_the_shares(kind: str) -> None:
    changes_NP = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    strategy, base = Strategy(section(kind)), {"x": torch.zeros(2)}
    learned = strategy.next(base, contributions(changes_NP, qualities=[0.9, 0.9, 0.9, 0.1]))["x"]
    shares_N = torch.tensor(list(strategy.shares.values()))
    torch.testing.assert_close(learned, shares_N @ changes_NP)
    assert strategy.shares["s3"] < 0.15
    assert learned[0] > 0.7
