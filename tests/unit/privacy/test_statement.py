"""A statement: what left on each path, what it cost a record, with updates, and in all; nothing of a broken ledger."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.privacy.analytic import gaussian_epsilon
from isthmus.privacy.events import ALL, Charge, Release
from isthmus.privacy.ledger import FileLedger
from isthmus.privacy.statement import Statement, read_statement
from isthmus.recipe import PrivacySection

SECTION = PrivacySection(record_epsilon=9.0)
DELTA = SECTION.delta
ROWS = {"ann": 0.3, "bob": 0.1}
UPDATE = 0.25


def forward(record: str, charge: float) -> Release:
    return Release("forward", 1, 2, 8, 1.0, 0.5, 64, "dp_gaussian", "sequence", (Charge(record, charge),))


def update(charge: float = UPDATE) -> Release:
    return Release("update", 1, 1, 8, 1.0, 2.0, 32, "dp_gaussian", charges=(Charge(ALL, charge),))


def stated(folder: Path, *releases: Release) -> Statement:
    ledger = FileLedger(folder / "ledger.jsonl", silo="a")
    for release in releases:
        ledger.record(release)
    ledger.close()
    return read_statement(folder / "ledger.jsonl", "a", SECTION)


def test_records_are_charged_their_own_and_with_updates_these_as_well(tmp_path: Path) -> None:
    told = stated(tmp_path, *(forward(record, charge) for record, charge in ROWS.items()), update(), update())
    assert told.records == 2
    assert told.worst.value == pytest.approx(gaussian_epsilon(0.3, DELTA))
    assert told.with_updates.value == pytest.approx(gaussian_epsilon(0.3 + 2 * UPDATE, DELTA))
    assert told.whole.value == pytest.approx(gaussian_epsilon(0.4 + 2 * UPDATE, DELTA))
    assert told.record_left == pytest.approx(9.0 - told.worst.value)
    assert told.silo_left is None


def test_without_updates_they_add_nothing(tmp_path: Path) -> None:
    told = stated(tmp_path, *(forward(record, charge) for record, charge in ROWS.items()))
    assert told.with_updates == told.worst
    assert told.with_updates.value > 0


def test_updates_alone_are_charged_to_any_record(tmp_path: Path) -> None:
    told = stated(tmp_path, update())
    assert told.records == 0
    assert told.worst.value == 0
    assert told.with_updates.value == pytest.approx(gaussian_epsilon(UPDATE, DELTA))


def test_each_path_is_told_with_its_mechanisms(tmp_path: Path) -> None:
    told = stated(tmp_path, forward("ann", 0.1), forward("bob", 0.1), update())
    assert (told.paths["forward"].releases, told.paths["forward"].bytes) == (2, 128)
    assert told.paths["forward"].mechanisms == ("dp_gaussian a sequence, clip 1, noise 0.5",)
    assert told.paths["forward"].median is not None
    assert told.paths["update"].median is None
    assert "gradient" not in told.paths


@pytest.mark.parametrize(
    ("summed", "honest", "told"),
    [
        (0, 0, ""),
        (5, 0, " in masked sums of 5 silos or more"),
        (5, 4, " in masked sums of 5 silos or more, 4 of them honest"),
    ],
)
def test_the_size_of_the_sums_that_hide_an_update_is_told(tmp_path: Path, summed: int, honest: int, told: str) -> None:
    one = replace(update(), mechanism="summed" if honest else "gaussian", summed=summed, honest=honest)
    (mechanism,) = stated(tmp_path, one).paths["update"].mechanisms
    assert mechanism.endswith(f"noise 2{told}")


def test_an_unbounded_epsilon_is_null_in_json(tmp_path: Path) -> None:
    told = stated(tmp_path, Release("forward", 1, 1, 8, 0.0, 0.0, 32, charges=(Charge("ann", float("inf")),)))
    assert json.loads(json.dumps(told.to_dict(), allow_nan=False))["worst"]["value"] is None


def test_an_absent_ledger_is_empty_and_a_broken_one_says_why(tmp_path: Path) -> None:
    assert read_statement(tmp_path / "none.jsonl", "a", SECTION) == Statement(
        "a", DELTA, verified=True, record_budget=9.0
    )
    stated(tmp_path, update())
    path = tmp_path / "ledger.jsonl"
    path.write_text(path.read_text().replace('"size": 32', '"size": 33').replace('"size":32', '"size":33'))
    broken = read_statement(path, "a", SECTION)
    assert not broken.verified
    assert broken.reason
    assert not broken.paths
