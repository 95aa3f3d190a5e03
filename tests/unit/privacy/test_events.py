"""Events: immutable, whole again from a ledger's line, and refused where this version does not know them."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import LedgerError
from isthmus.privacy.events import Charge, Release, merged
from isthmus.privacy.ledger import release_from_json, release_to_json

RELEASE = Release(
    "forward", 3, 7, 32, 1.5, 0.25, 896, charges=(Charge("a", 0.5), Charge("b", 0.0, 2.5), Charge("c", math.inf))
)
AMOUNT = st.floats(0, 1e12)
CHARGES = st.builds(Charge, st.text(min_size=1, max_size=4), AMOUNT, AMOUNT, st.sampled_from([0.0, 0.125, 3.0]))


def test_a_release_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        RELEASE.noise = 9.0  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        RELEASE.extra = 1  # type: ignore[attr-defined]
    assert len({RELEASE, release_from_json(release_to_json(RELEASE))}) == 1


@given(st.lists(CHARGES, max_size=4), st.sampled_from(["gaussian", "dp_gaussian", "metric", "summed"]), st.booleans())
def test_a_release_comes_whole_from_its_line(charges: list[Charge], mechanism: Any, bounded: bool) -> None:
    told = merged(charges) if bounded else (Charge("x", math.inf),)
    release = Release("gradient", 1, 2, 3, 0.5, 0.1, 4, mechanism, "sequence", told)
    line = json.dumps(release_to_json(release), allow_nan=False)
    assert release_from_json(json.loads(line)) == release


@pytest.mark.parametrize(
    "change",
    [
        {"mechanism": "laplace"},
        {"path": "sideways"},
        {"unit": "silo"},
        {"charges": {"a": -1.0}},
        {"charges": {"a": [1.0, -1.0]}},
        {"charges": {"a": [1.0]}},
        {"charges": {"a": [1.0, 0.0, -0.5]}},
        {"charges": {"a": [1.0, 0.0, 0.5, 0.5]}},
        {"charges": {"a": "much"}},
        {"charges": {"a": math.nan}},
        {"charges": [1.0]},
        {"charges": None},
        {"colour": "red"},
    ],
    ids=str,
)
def test_an_event_that_cannot_be_accounted_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(LedgerError, match="cannot be accounted"):
        release_from_json(release_to_json(RELEASE) | change)
    with pytest.raises(LedgerError, match="cannot be accounted"):
        release_from_json({"path": "forward"})


@given(st.lists(st.builds(Charge, st.sampled_from("abc"), AMOUNT, AMOUNT)))
def test_merged_charges_lose_nothing(charges: list[Charge]) -> None:
    found = merged(charges)
    assert [one.record for one in found] == list(dict.fromkeys(one.record for one in charges))
    for kind in ("gaussian", "pure"):
        total = sum(getattr(one, kind) for one in charges)
        assert sum(getattr(one, kind) for one in found) == pytest.approx(total)
