"""The charge of an answer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from isthmus.gateway.privacy_charge import PrivacyCharge
from isthmus.privacy.accountant import Accountant
from isthmus.privacy.events import Charge, Release

ONE = Release("forward", 0, 3, 8, 1.0, 1.0, 96, charges=(Charge("a", 0.5),))


def test_releases_compose() -> None:
    other = replace(ONE, charges=(Charge("b", 0.7),), size=4)
    charge = PrivacyCharge.of([ONE, ONE, other], 1e-5)
    assert (charge.releases, charge.bytes) == (3, 196)
    assert charge.epsilon == pytest.approx(Accountant(1e-5, [ONE, ONE]).worst().value)
    assert charge.headers()["X-Isthmus-Releases"] == "3"
    assert float(charge.headers()["X-Isthmus-Epsilon"]) == pytest.approx(charge.epsilon, rel=1e-5)
    assert charge.body()["epsilon"] == charge.epsilon


def test_without_noise_there_is_no_bound() -> None:
    charge = PrivacyCharge.of([replace(ONE, charges=(Charge("a", math.inf),))], 1e-5)
    assert charge.headers()["X-Isthmus-Epsilon"] == "unbounded"
    assert charge.body()["epsilon"] is None


def test_nothing_costs_nothing() -> None:
    assert PrivacyCharge.of([], 1e-5) == PrivacyCharge(0, 0, 0.0, 1e-5)
