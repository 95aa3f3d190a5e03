"""Noise that the root adds: to sums and to open updates, charged in its own ledger before anybody sees the mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import LedgerError
from isthmus.federation.central import CentralNoise, central_noise
from isthmus.federation.collection import Collected
from isthmus.federation.contribution import Contribution
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import Recipe
from isthmus.storage.record import RoleDirectory
from tests.conftest import make_recipe

CLIP, SIZE = 1.0, 400


def recipe_of(epsilon: float = 8.0, where: str = "root", **clip: Any) -> Recipe:
    noised = {"weights": "equal", "noise": {"epsilon": epsilon, "where": where}, "clip": {"norm": CLIP, **clip}}
    secure = {"secure": True} if where == "silos" else {}
    return make_recipe(Path("none"), silos=("a", "b", "c"), federation={**noised, **secure}, train={"rounds": 2})


def noise_of(folder: Path, **settings: Any) -> CentralNoise:
    made = central_noise(recipe_of(**settings), RoleDirectory(folder))
    assert made is not None
    return made


def collected(length: float = 1.0, **weights: float) -> Collected:
    row = torch.full((SIZE,), length / SIZE**0.5)
    learned = tuple(Contribution(name, weight, {"x": row}) for name, weight in weights.items())
    return Collected(dict(weights), learned)


def test_only_a_root_that_is_to_noise_does(tmp_path: Path) -> None:
    store = RoleDirectory(tmp_path)
    assert central_noise(make_recipe(Path("none")), store) is None
    assert central_noise(recipe_of(where="silos"), store) is None


def test_the_mean_is_of_clipped_updates_all_alike_and_noised(tmp_path: Path) -> None:
    found = noise_of(tmp_path, epsilon=1e6).added(1, collected(2.0, a=1.0, b=99.0), CLIP)
    (mean,) = found.contributions
    assert mean.weight == 2.0
    assert float(mean.change["x"].norm()) == pytest.approx(CLIP, rel=0.05)
    assert found.weights == {"a": 1.0, "b": 99.0}
    strong = noise_of(tmp_path / "strong", epsilon=0.5).added(1, collected(2.0, a=1.0, b=1.0), CLIP)
    assert float(strong.contributions[0].change["x"].norm()) > 2 * CLIP


def test_what_it_cost_is_in_the_roots_ledger(tmp_path: Path) -> None:
    noise_of(tmp_path).added(1, collected(a=1.0, b=1.0), CLIP)
    (event,) = read_ledger(tmp_path / "ledger.jsonl").releases()
    assert (event.path, event.width, event.honest, event.charges[0].bounded) == ("update", SIZE, 1, True)


def test_a_round_of_nobody_costs_nothing(tmp_path: Path) -> None:
    nothing = Collected({"a": 0.0}, ())
    assert noise_of(tmp_path).added(1, nothing, CLIP) is nothing
    assert not list(read_ledger(tmp_path / "ledger.jsonl").releases())


def test_a_root_that_published_and_lost_its_ledger_does_not_go_on(tmp_path: Path) -> None:
    store = RoleDirectory(tmp_path)
    store.journal("metrics").append({"round": 1, "weights": {"a": 1.0}})
    with pytest.raises(LedgerError):
        central_noise(recipe_of(), store)
