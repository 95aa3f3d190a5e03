"""Epsilons against dp-accounting, which is told the mechanisms' own parameters and composes by itself."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import dp_accounting
import pytest
import torch
from dp_accounting.pld import common, privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.privacy.accountant import Account, Accountant
from isthmus.privacy.ledger import MemoryLedger, read_ledger
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import BoundarySection, ReleaseSection
from isthmus.silo.boundary import Boundary

DELTA = 1e-5
STEP = 1e-4
RECORDS = ("a", "b", "c")

Sequence = tuple[str, tuple[float, ...]]
"""A record and the noise factors of its rows."""
SEQUENCES = st.lists(
    st.tuples(st.sampled_from(RECORDS), st.lists(st.floats(0.5, 4.0), min_size=1, max_size=3).map(tuple)),
    min_size=1,
    max_size=3,
)
RELEASES = st.lists(st.tuples(st.sampled_from(["forward", "gradient"]), SEQUENCES), min_size=1, max_size=4)
GAUSSIAN = st.builds(
    lambda clip, ratio: ReleaseSection(clip=clip, noise=clip * ratio), st.floats(0.1, 10), st.floats(2, 9)
)
CALIBRATED = st.builds(
    lambda clip, epsilon, delta, unit: ReleaseSection(
        mechanism="dp_gaussian", clip=clip, epsilon=epsilon, delta=delta, unit=unit
    ),
    st.floats(0.1, 10),
    st.floats(0.2, 3),
    st.floats(1e-7, 1e-3),
    st.sampled_from(["token", "sequence"]),
)
METRIC = st.builds(
    lambda clip, pure: ReleaseSection(mechanism="metric", clip=clip, epsilon=pure / (2 * clip)),
    st.floats(0.1, 10),
    st.floats(0.01, 0.4),
)


class Independent:
    """Composes one record's rows, a mechanism at a time, in dp-accounting's own terms."""

    def __init__(self) -> None:
        self.multipliers: list[float] = []
        self.pures: list[float] = []

    def add(self, section: ReleaseSection, factors: tuple[float, ...]) -> None:
        if section.mechanism == "metric":
            self.pures += [2 * section.clip * section.epsilon / factor for factor in factors]
        elif section.mechanism == "gaussian":
            self.multipliers += [section.noise * factor / (2 * section.clip) for factor in factors]
        else:
            sigma = dp_accounting.get_sigma_gaussian(section.epsilon, section.delta)
            self.multipliers += [sigma] if section.unit == "sequence" else [sigma * factor for factor in factors]

    def epsilon(self) -> float:
        accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=STEP)
        for multiplier in self.multipliers:
            accountant.compose(dp_accounting.GaussianDpEvent(multiplier))
        composed = accountant._pld
        for pure in self.pures:
            told = common.DifferentialPrivacyParameters(pure, 0.0)
            composed = composed.compose(privacy_loss_distribution.from_privacy_parameters(told, STEP))
        return float(composed.get_epsilon_for_delta(DELTA))


def released(
    sections: dict[str, ReleaseSection], releases: list[tuple[str, list[Sequence]]]
) -> tuple[MemoryLedger, dict[str, Independent]]:
    """Real releases through a boundary; its ledger, and the same composed independently, by record."""
    ledger, records = MemoryLedger(), defaultdict(Independent)
    boundary = Boundary(BoundarySection(**sections), ledger)
    for step, (path, sequences) in enumerate(releases):
        factors = [factor for _, each in sequences for factor in each]
        names, lengths = tuple(name for name, _ in sequences), tuple(len(each) for _, each in sequences)
        subjects = Subjects(names, lengths, torch.tensor(factors, dtype=torch.float64))
        boundary.release(torch.randn(len(factors), 3), path, step, subjects)  # type: ignore[arg-type]
        for name, each in sequences:
            records[name].add(sections[path], each)
    return ledger, records


def assert_equal(accountant: Accountant, records: dict[str, Independent]) -> None:
    assert set(accountant.records) == set(records)
    for name, independent in records.items():
        steps = len(independent.multipliers) + len(independent.pures)
        found = accountant.records[name].epsilon(DELTA)
        assert found.value == pytest.approx(independent.epsilon(), rel=2e-3, abs=steps * 2 * STEP)


@settings(deadline=None, max_examples=25)
@given(st.one_of(GAUSSIAN, CALIBRATED), st.one_of(GAUSSIAN, CALIBRATED), RELEASES)
def test_epsilon_of_gaussian_releases(
    forward: ReleaseSection, gradient: ReleaseSection, releases: list[tuple[str, list[Sequence]]]
) -> None:
    ledger, records = released({"forward": forward, "gradient": gradient}, releases)
    accountant = Accountant(DELTA, ledger.history())
    assert_equal(accountant, records)
    assert {one.epsilon(DELTA).method for one in accountant.records.values()} == {"analytic"}


@settings(deadline=None, max_examples=15)
@given(st.one_of(GAUSSIAN, CALIBRATED, METRIC), METRIC, RELEASES)
def test_epsilon_of_mixed_releases(
    forward: ReleaseSection, gradient: ReleaseSection, releases: list[tuple[str, list[Sequence]]]
) -> None:
    """Pure epsilons of one release's rows are added, which can be more than composing them row by row gives."""
    ledger, records = released({"forward": forward, "gradient": gradient}, releases)
    for name, account in Accountant(DELTA, ledger.history()).records.items():
        independent = records[name]
        exact = independent.epsilon()
        steps = len(independent.multipliers) + len(independent.pures)
        added = (
            dp_accounting.get_epsilon_gaussian(
                sum(multiplier**-2 for multiplier in independent.multipliers) ** -0.5, DELTA
            )
            if independent.multipliers
            else 0.0
        )
        assert exact - steps * 2 * STEP <= account.epsilon(DELTA).value * (1 + 2e-3)
        assert account.epsilon(DELTA).value <= (added + sum(independent.pures)) * (1 + 1e-6) + steps * 2 * STEP


@settings(deadline=None, max_examples=12)
@given(
    st.lists(st.tuples(st.one_of(GAUSSIAN, CALIBRATED, METRIC), st.floats(0.5, 4)), min_size=1, max_size=4),
)
def test_epsilon_of_mixed_single_rows(told: list[tuple[ReleaseSection, float]]) -> None:
    """Of releases of one row each, mechanisms mixed at will, the composition is dp-accounting's own."""
    ledger, independent = MemoryLedger(), Independent()
    for step, (section, factor) in enumerate(told):
        boundary = Boundary(BoundarySection(forward=section), ledger)
        boundary.release(torch.randn(1, 3), "forward", step, Subjects(("a",), (1,), torch.tensor([factor]).double()))
        independent.add(section, (factor,))
    assert_equal(Accountant(DELTA, ledger.history()), {"a": independent})


@pytest.mark.parametrize("charge", [0.01, 0.5, 1.0, 4.0, 25.0, 100.0])
@pytest.mark.parametrize("delta", [1e-8, 1e-5, 1e-2])
def test_the_closed_form_is_what_loss_distributions_give(charge: float, delta: float) -> None:
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(dp_accounting.GaussianDpEvent(charge**-0.5))
    assert Account(charge).epsilon(delta).value == pytest.approx(accountant.get_epsilon(delta), rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("count", [1, 3, 50])
def test_self_composition(count: int) -> None:
    accountant = dp_accounting.pld.PLDAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(10.0), count)
    assert Account(count / 100).epsilon(DELTA).value == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-3)


def test_the_gaussian_bound_holds_by_its_definition() -> None:
    """P(loss > epsilon) − e^epsilon·P'(loss > epsilon) = delta, for one dimension, by numerical integration."""
    account = Account(4.0)
    epsilon = account.epsilon(DELTA).value
    sigma = 0.5
    x = torch.linspace(-8, 8, 2_000_001, dtype=torch.float64)

    def density(mean: float) -> torch.Tensor:
        return torch.exp(-((x - mean) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))

    delta = float(torch.trapezoid((density(1.0) - math.exp(epsilon) * density(0.0)).clamp_min(0), x))
    assert delta == pytest.approx(DELTA, rel=1e-3)


def test_a_ledger_on_disk_tells_the_same(tmp_path: Path) -> None:
    from isthmus.privacy.ledger import FileLedger

    sections = {path: ReleaseSection(clip=1.0, noise=3.0) for path in ("forward", "gradient")}
    releases = [("forward", [("a", (1.0, 2.0)), ("b", (0.5,))]), ("gradient", [("a", (1.0,))])]
    memory, _ = released(sections, releases)  # type: ignore[arg-type]
    file = FileLedger(tmp_path / "ledger.jsonl")
    for release in memory.history():
        file.record(release)
    assert Accountant(DELTA, read_ledger(file.path).releases()).records == Accountant(DELTA, memory.history()).records
