"""The worst silo, the spread and the gains, from what silos have measured."""

from __future__ import annotations

import pytest

from isthmus.report.progress import SiloStatus
from isthmus.report.spread import spread_of


def silo(name: str, measure: str, *scores: float, first: int = 0) -> SiloStatus:
    return SiloStatus(name, scores={number: {measure: score} for number, score in enumerate(scores, first)})


def test_by_accuracy_the_lowest_is_the_worst() -> None:
    spread = spread_of(
        [silo("a", "accuracy", 0.5, 0.9, 0.8), silo("b", "accuracy", 0.5, 0.7), silo("c", "accuracy", 0.9, 0.8)]
    )
    assert spread is not None
    assert (spread.round, spread.silo, spread.worst) == (1, "b", 0.7)
    assert spread.mean == pytest.approx(0.8)
    assert spread.deviation == pytest.approx((0.02 / 3) ** 0.5)
    assert spread.gains == pytest.approx({"a": 0.4, "b": 0.2, "c": -0.1})


def test_by_loss_the_highest_is_the_worst_and_less_is_a_gain() -> None:
    spread = spread_of([silo("a", "loss", 3.0, 1.0), silo("b", "loss", 2.0, 2.5)])
    assert spread is not None
    assert (spread.silo, spread.worst, spread.measure) == ("b", 2.5, "loss")
    assert spread.gains == pytest.approx({"a": 2.0, "b": -0.5})


def test_who_did_not_measure_at_first_has_no_gain() -> None:
    spread = spread_of([silo("a", "loss", 3.0, 1.0), silo("b", "loss", 2.5, first=1)])
    assert spread is not None
    assert set(spread.gains) == {"a"}


def test_without_a_round_that_all_measured_there_is_none() -> None:
    assert spread_of([silo("a", "loss", 3.0), silo("b", "loss", 2.5, first=1)]) is None
    assert spread_of([silo("a", "loss", 3.0), silo("b", "accuracy", 0.5)]) is None
    assert spread_of([SiloStatus("a")]) is None
