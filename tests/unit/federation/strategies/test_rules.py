"""Every rule against its oracle, and against contributions as wild as numbers get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import QuorumError
from isthmus.federation.contribution import Contribution
from isthmus.federation.strategies import rules
from isthmus.federation.strategies.neighbours import Mixed
from isthmus.federation.strategies.rules import CenteredClipping, Rule
from isthmus.federation.strategies.strategy import RULES, Strategy
from isthmus.recipe import FederationSection
from isthmus.recipe.sections.federation.robust import RuleName, fewest
from tests.unit.federation.strategies.oracles import ORACLES, mixed, spread

WILD = 3e38
INSIDE: tuple[RuleName, ...] = ("median", "trimmed-mean", "krum", "multi-krum", "bulyan")
"""Rules that stay between the honest values of each parameter."""
CHOOSING: tuple[RuleName, ...] = ("krum", "multi-krum", "bulyan")
"""Rules whose choices tie among mixed changes, of which many are the same: then no answer is the only right one."""


@dataclass(frozen=True)
class Round:
    rule: RuleName
    changes_NP: torch.Tensor
    weights_N: torch.Tensor
    faults: int
    mix: bool = False

    def combine(self, changes_NP: torch.Tensor | None = None, weights_N: torch.Tensor | None = None) -> torch.Tensor:
        combined_P = make(self.rule, self.mix).combine(
            self.changes_NP if changes_NP is None else changes_NP,
            self.weights_N if weights_N is None else weights_N,
            self.faults,
        )
        assert combined_P.dtype == torch.float64
        assert combined_P.shape == self.changes_NP.shape[1:]
        return combined_P


def make(name: RuleName, mix: bool = False) -> Rule:
    return Mixed(RULES[name]()) if mix else RULES[name]()


def equal(count: int) -> torch.Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


@st.composite
def rounds(
    draw: st.DrawFn,
    *,
    of: tuple[RuleName, ...] = tuple(RULES),
    unmixed: tuple[RuleName, ...] = ("fltrust", *CHOOSING),
    weighted: bool = True,
) -> Round:
    rule = draw(st.sampled_from(of))
    mixing = rule not in unmixed and draw(st.booleans())
    faults = draw(st.integers(1, 3))
    count = max(faults + 1, fewest(rule, faults, mix=mixing)) + draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size, scale, shift = draw(st.integers(1, 6)), draw(st.sampled_from([1e-6, 1.0, 1e4])), draw(st.floats(-3, 3))
    changes_NP = scale * (torch.randn(count, size, generator=generator) + shift)
    weights_N = torch.rand(count, dtype=torch.float64, generator=generator) + 0.01
    return Round(rule, changes_NP, weights_N / weights_N.sum() if weighted else equal(count), faults, mixing)


def size_of(changes_NP: torch.Tensor) -> float:
    return float(changes_NP.abs().max())


def assert_near(actual_P: torch.Tensor, expected_P: torch.Tensor, scale: float) -> None:
    assert float((actual_P - expected_P).abs().max()) <= 1e-6 * scale, (actual_P, expected_P)


@settings(max_examples=200, deadline=None)
@given(rounds(of=tuple(name for name in RULES if name != "geometric-median")))
def test_the_oracle_says_the_same(case: Round) -> None:
    changes = case.changes_NP.double().tolist()
    changes = mixed(changes, case.faults) if case.mix else changes
    expected = ORACLES[case.rule](changes, case.weights_N.tolist(), case.faults)
    assert_near(case.combine(), torch.tensor(expected, dtype=torch.float64), size_of(case.changes_NP))


@settings(max_examples=30, deadline=None)
@given(rounds(of=("geometric-median",), unmixed=("geometric-median",)))
def test_no_point_is_nearer_than_the_geometric_median(case: Round) -> None:
    changes, weights = case.changes_NP.double().tolist(), case.weights_N.tolist()
    scale = size_of(case.changes_NP)
    changes = [[value / scale for value in change] for change in changes]
    best = spread(changes, weights, ORACLES["geometric-median"](changes, weights, case.faults))
    assert spread(changes, weights, (case.combine() / scale).tolist()) <= best + 1e-4


def test_a_contribution_that_is_the_geometric_median_is_found() -> None:
    """Steps come ever more slowly nearer to it: after 200 they were still 0.0002 of the changes' size too far."""
    for seed, shape in ((339, (4, 2)), (882, (4, 5)), (1411, (5, 2)), (259, (3, 4))):
        changes_NP = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        weights_N = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
        weights_N /= weights_N.sum()
        changes, weights = changes_NP.double().tolist(), weights_N.tolist()
        best = spread(changes, weights, ORACLES["geometric-median"](changes, weights, 0))
        found = make("geometric-median").combine(changes_NP, weights_N, 0)
        assert spread(changes, weights, found.tolist()) <= best + 1e-6


def test_the_geometric_median_leaves_a_contribution_that_it_begins_at() -> None:
    """The median of each parameter is a contribution here, and steps of unsmoothed weights would stay there."""
    changes_NP = torch.tensor(
        [[0.1, 0.4], [-0.7, -1.3], [-1.4, 0.9], [-2.3, -1.2], [-0.5, -1.1], [1.1, 0.5], [-1.0, 0.2]]
    )
    weights_N = torch.tensor([0.11, 0.06, 0.06, 0.33, 0.27, 0.13, 0.04], dtype=torch.float64)
    start_P = make("median").combine(changes_NP, weights_N, 1)
    assert torch.equal(start_P, changes_NP[4].double())
    found_P = make("geometric-median").combine(changes_NP, weights_N, 1)
    changes, weights = changes_NP.double().tolist(), weights_N.tolist()
    assert spread(changes, weights, found_P.tolist()) < 0.995 * spread(changes, weights, start_P.tolist())


@settings(max_examples=100, deadline=None)
@given(rounds(), st.randoms(use_true_random=False))
def test_the_order_of_contributions_does_not_matter(case: Round, random: Any) -> None:
    order = list(range(len(case.changes_NP)))
    first = order[:1] if case.rule == "fltrust" else []  # the trusted one stays where it is
    rest = order[len(first) :]
    random.shuffle(rest)
    order = first + rest
    shuffled_P = case.combine(case.changes_NP[order], case.weights_N[order])
    assert_near(shuffled_P, case.combine(), size_of(case.changes_NP))


@settings(max_examples=100, deadline=None)
@given(rounds())
def test_what_all_say_is_what_is_done(case: Round) -> None:
    change_P = case.changes_NP[0]
    combined_P = case.combine(change_P.expand_as(case.changes_NP).contiguous())
    assert_near(combined_P, change_P.double(), size_of(change_P) * (1e5 if case.rule == "centered-clipping" else 1))


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_nothing_is_made_of_nothing(name: RuleName, mix: bool) -> None:
    changes_NP = torch.zeros(9, 4)
    assert torch.equal(make(name, mix).combine(changes_NP, equal(9), 1), torch.zeros(4, dtype=torch.float64))


@st.composite
def attacked(draw: st.DrawFn, of: tuple[RuleName, ...]) -> tuple[Round, torch.Tensor]:
    """A round with as many wild contributions as the rule claims to bear, and its honest changes."""
    case = draw(rounds(of=of, unmixed=("fltrust", "mean"), weighted=False))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = draw(st.sampled_from([1e10, 1e20, WILD]))
    together = draw(st.booleans())
    directions = torch.randn(1 if together else case.faults, case.changes_NP.shape[1], generator=generator)
    changes_NP = case.changes_NP.clone()
    wild = torch.randperm(len(changes_NP) - 1, generator=generator)[: case.faults] + 1  # never the trusted one
    changes_NP[wild] = (size * (directions / directions.abs().max())).expand(case.faults, -1)
    honest = [number for number in range(len(changes_NP)) if number not in wild.tolist()]
    return Round(case.rule, changes_NP, case.weights_N, case.faults, case.mix), case.changes_NP[honest].double()


@settings(max_examples=200, deadline=None)
@given(attacked(INSIDE))
def test_the_result_stays_between_the_honest_changes(drawn: tuple[Round, torch.Tensor]) -> None:
    case, honest_HP = drawn
    slack = 1e-9 * size_of(honest_HP)
    combined_P = case.combine()
    assert (combined_P >= honest_HP.amin(dim=0) - slack).all()
    assert (combined_P <= honest_HP.amax(dim=0) + slack).all()


@settings(max_examples=100, deadline=None)
@given(attacked(("geometric-median",)))
def test_the_geometric_median_stays_as_near_as_it_claims(drawn: tuple[Round, torch.Tensor]) -> None:
    case, honest_HP = drawn
    center_P = honest_HP.mean(dim=0)
    count = len(case.changes_NP)
    factor = 2 * (count - case.faults) / (count - 2 * case.faults)
    reach = float(rules.distances(honest_HP, center_P).max())
    assert (case.combine() - center_P).norm() <= factor * reach * (1 + 1e-4) + 1e-9 * size_of(honest_HP)


@settings(max_examples=100, deadline=None)
@given(attacked(("centered-clipping",)))
def test_centered_clipping_comes_near_by_the_factor_it_claims(drawn: tuple[Round, torch.Tensor]) -> None:
    """Each step leaves 2f/N of the distance to the honest mean, and adds what the honest changes differ by at most."""
    case, honest_HP = drawn
    center_P = honest_HP.mean(dim=0)
    reach = float(rules.distances(honest_HP, center_P).max())
    bound, share = float(center_P.norm()), case.faults / len(case.changes_NP)
    for _ in range(CenteredClipping.steps):
        bound = 2 * share * bound + 4 * reach
    assert (case.combine() - center_P).norm() <= bound * (1 + 1e-6) + 1e-9 * size_of(honest_HP)


@settings(max_examples=60, deadline=None)
@given(attacked(("norm-bound",)))
def test_a_bounded_norm_is_bounded(drawn: tuple[Round, torch.Tensor]) -> None:
    case, honest_HP = drawn
    assert case.combine().norm() <= honest_HP.norm(dim=1).max() * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(attacked(("fltrust",)))
def test_trust_bounds_length_and_direction(drawn: tuple[Round, torch.Tensor]) -> None:
    case, _ = drawn
    trusted_P = case.changes_NP[0].double()
    combined_P = case.combine()
    assert combined_P.norm() <= trusted_P.norm() * (1 + 1e-9)
    assert combined_P @ trusted_P > 0


@settings(max_examples=30, deadline=None)
@given(attacked(("mean",)))
def test_the_mean_goes_anywhere(drawn: tuple[Round, torch.Tensor]) -> None:
    case, honest_HP = drawn
    reach = (honest_HP - honest_HP.mean(dim=0)).norm(dim=1).max()
    assert (case.combine() - honest_HP.mean(dim=0)).norm() > 1e3 * reach


def test_columns_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    changes_NP = torch.randn(9, 50, generator=torch.Generator().manual_seed(1))
    whole = {name: make(name).combine(changes_NP, equal(9), 1) for name in RULES}
    for module in ("rules", "neighbours"):
        monkeypatch.setattr(f"isthmus.federation.strategies.{module}.COLUMNS", 7)
    for name, expected_P in whole.items():
        torch.testing.assert_close(make(name).combine(changes_NP, equal(9), 1), expected_P)


def contributions(changes_NP: torch.Tensor, weights: list[float] | None = None) -> list[Contribution]:
    weights = weights or [1.0] * len(changes_NP)
    return [
        Contribution(f"silo-{number}", weight, {"x": change_P})
        for number, (weight, change_P) in enumerate(zip(weights, changes_NP, strict=True))
    ]


def section(rule: str, **keys: Any) -> FederationSection:
    trusted = {"trusted": "silo-0"} if rule == "fltrust" else {}
    return FederationSection.model_validate({"robust": {"rule": rule, **trusted, **keys}})


@pytest.mark.parametrize(
    ("keys", "enough"),
    [
        ({"rule": "mean"}, 1),
        ({"rule": "norm-bound"}, 3),
        ({"rule": "median"}, 3),
        ({"rule": "trimmed-mean"}, 3),
        ({"rule": "krum"}, 5),
        ({"rule": "multi-krum"}, 5),
        ({"rule": "bulyan"}, 7),
        ({"rule": "geometric-median"}, 3),
        ({"rule": "centered-clipping"}, 3),
        ({"rule": "fltrust"}, 1),
        ({"rule": "mean", "mix": True}, 3),
        ({"rule": "krum", "mix": True}, 5),
        ({"rule": "trimmed-mean", "malicious": 0.4}, 3),
    ],
    ids=str,
)
def test_too_few_are_refused(keys: dict[str, Any], enough: int) -> None:
    strategy, base = Strategy(section(**keys)), {"x": torch.zeros(2)}
    for count in range(1, enough):
        with pytest.raises(QuorumError, match=f"{count} silos learned something.* needs") as caught:
            strategy.next(base, contributions(torch.ones(count, 2)))
        assert "isthmus run --resume" in caught.value.remedy
    torch.testing.assert_close(strategy.next(base, contributions(torch.ones(enough, 2)))["x"], torch.ones(2))


@pytest.mark.parametrize(("malicious", "count", "faults"), [(0.2, 3, 1), (0.2, 10, 2), (0.29, 100, 29), (0.3, 19, 5)])
def test_a_share_in_whole_contributions(malicious: float, count: int, faults: int) -> None:
    assert section("median", malicious=malicious).robust.faults(count) == faults


@pytest.mark.parametrize("keys", [{"rule": "median"}, {"rule": "norm-bound"}, {"rule": "mean", "mix": True}], ids=str)
def test_a_claimed_weight_is_not_believed(keys: dict[str, Any]) -> None:
    changes_NP = torch.tensor([[1.0], [1.1], [0.9], [1.0], [-1.0]])
    claimed = contributions(changes_NP, [1.0, 1.0, 1.0, 1.0, 1e30])
    base = {"x": torch.zeros(1)}
    believing = Strategy(section("mean")).next(base, claimed)["x"]
    assert float(believing) == pytest.approx(-1.0)
    assert float(Strategy(section(**keys)).next(base, claimed)["x"]) > 0.5


def test_the_trusted_one_is_known_by_its_name() -> None:
    changes_NP = torch.tensor([[-1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    base = {"x": torch.zeros(2)}
    strategy = Strategy(section("fltrust", trusted="silo-1"))
    assert strategy.next(base, contributions(changes_NP))["x"].tolist() == [0.0, 2.0]
    with pytest.raises(QuorumError, match="the trusted silo 'silo-1' learned nothing") as caught:
        strategy.next(base, contributions(changes_NP[:1]))
    assert "silo-1" in caught.value.remedy


@pytest.mark.parametrize("keys", [{"rule": rule} for rule in RULES] + [{"rule": "centered-clipping", "mix": True}])
def test_a_strategy_that_stopped_goes_on_as_if_it_had_not(keys: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = (contributions(torch.randn(9, 4, generator=generator)) for _ in range(2))
    base = {"x": torch.zeros(4)}
    going, resumed = Strategy(section(**keys)), Strategy(section(**keys))
    base = going.next(base, first)
    resumed.load_state_dict(going.state_dict())
    assert torch.equal(resumed.next(base, second)["x"], going.next(base, second)["x"])


def test_centered_clipping_remembers() -> None:
    changes_NP = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    rule = CenteredClipping()
    first_P, second_P = (rule.combine(changes_NP, equal(9), 1) for _ in range(2))
    assert not torch.equal(first_P, second_P)
    assert torch.equal(CenteredClipping().combine(changes_NP, equal(9), 1), first_P)
