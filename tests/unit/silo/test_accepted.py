"""How far a round's adapters may be from the initial ones and the last: the recipe's bound, and what it implies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import ProtocolError
from isthmus.federation.strategies.optimizers import GradientOptimizer, optimizer_of
from isthmus.recipe import Recipe
from isthmus.silo.accepted import AcceptedAdapters, distance, max_change, max_mean
from isthmus.silo.join import keep_shared
from isthmus.silo.served import SharedAdapters
from isthmus.storage.record import RoleDirectory
from tests.conftest import make_recipe

COUNT = 400
START = {"x": torch.zeros(2, 2), "y": torch.ones(3)}


def recipe_of(rounds: int = 4, **sections: Any) -> Recipe:
    return make_recipe(Path("model"), silos=("a", "b", "c"), train={"rounds": rounds}, **sections)


def moved(completed: int, by: float, run: str = "r") -> SharedAdapters:
    """Adapters at this distance from the start, in one number."""
    tensors = {name: tensor.clone() for name, tensor in START.items()}
    tensors["y"][1] += by
    return SharedAdapters(completed, run, tensors)


def bounded(directory: RoleDirectory | None = None, change: float = 0.5) -> AcceptedAdapters:
    return AcceptedAdapters(recipe_of(federation={"max_change": change}), START, directory)


def test_each_round_may_change_them_by_the_bound() -> None:
    accepted = bounded()
    for completed, by in enumerate((0.0, 0.5, 1.0, 0.6)):
        accepted.accept(moved(completed, by))


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (None, moved(0, 0.1), "round 0 are 0.1 away from those of round 0; this silo accepts 0:"),
        (None, moved(1, 0.6), "round 1 are 0.6 away from those of round 0; this silo accepts 0.5: 0.5 a round"),
        (moved(1, 0.4), moved(2, -0.2), "round 2 are 0.6 away from those of round 1; this silo accepts 0.5"),
        (moved(1, 0.4), moved(1, 0.3), "round 1 are 0.1 away from those of round 1"),
        (moved(3, 0.4), moved(2, 1.1), "round 2 are 1.1 away from those of round 0"),
        (None, moved(5, 0.0), "adapters of round 5 of 4"),
        (None, moved(-1, 0.0), "adapters of round -1 of 4"),
    ],
)
def test_what_is_further_away_is_refused(first: SharedAdapters | None, second: SharedAdapters, told: str) -> None:
    accepted = bounded()
    if first is not None:
        accepted.accept(first)
    with pytest.raises(ProtocolError, match=told) as refused:
        accepted.accept(second)
    assert refused.value.remedy
    accepted.accept(first or moved(0, 0.0))  # the last ones stay


def test_going_back_and_forth_leads_no_further() -> None:
    accepted = bounded()
    accepted.accept(moved(4, 2.0))
    for _ in range(3):
        accepted.accept(moved(1, 0.5))
        with pytest.raises(ProtocolError):
            accepted.accept(moved(4, 2.1))
        accepted.accept(moved(4, 2.0))


def test_a_silo_that_starts_again_knows_what_it_accepted_last(tmp_path: Path) -> None:
    directory = RoleDirectory(tmp_path)
    keep_shared(directory, moved(2, 0.9))
    with pytest.raises(ProtocolError, match="away from those of round 2"):
        bounded(directory).accept(moved(3, 0.3))
    bounded(directory).accept(moved(3, 0.5))
    bounded(directory).accept(moved(3, 0.3, run="another"))


def test_without_a_bound_any_are_accepted() -> None:
    accepted = AcceptedAdapters(recipe_of(), START)
    assert accepted.bound is None
    accepted.accept(moved(1, 1e6))


def test_the_same_numbers_of_another_machine_are_accepted() -> None:
    bounded().accept(moved(0, 1e-6))


def test_distance_is_of_all_tensors_together() -> None:
    other = {"x": torch.full((2, 2), 1.5), "y": torch.ones(3) + torch.tensor([4.0, 0.0, 0.0])}
    assert distance(START, other) == pytest.approx(5.0)


CLIPPED: dict[str, Any] = {"update": {"clip": 2.0, "noise": 0.0}}
MASKED: dict[str, Any] = {"secure": {"masks": True, "range": 0.25}}


@pytest.mark.parametrize(
    ("federation", "boundary", "expected"),
    [
        ({}, {}, None),
        ({"max_change": 7.0}, CLIPPED, 7.0),
        ({}, CLIPPED, 2.0),
        ({}, {"update": {"clip": 2.0, "noise": 0.1}}, 2.0 + 0.1 * 26),
        ({"optimizer": {"kind": "momentum", "learning_rate": 0.5}}, CLIPPED, 10.0),
        ({"robust": "median"}, CLIPPED, None),
        ({"compression": {"kind": "random-k"}}, CLIPPED, None),
        ({"asynchronous": {"buffer": 2}}, CLIPPED, None),
        (MASKED, {}, 5.0),
        (MASKED | {"optimizer": {"kind": "momentum", "momentum": 0.5}}, {}, 10.0),
        (MASKED | {"compression": {"kind": "sketch"}}, {}, None),
        ({"lora": "svd"}, CLIPPED, None),
        ({"optimizer": {"kind": "adagrad", "learning_rate": 0.01}}, {}, 0.2),
        ({"optimizer": {"kind": "adam", "momentum": 0.0}}, {}, 0.001 / math.sqrt(0.01) * 20),
        ({"optimizer": {"kind": "adam", "momentum": 0.9, "second_momentum": 0.5}}, {}, None),
        ({"optimizer": {"kind": "yogi"}}, {}, None),
    ],
)
def test_the_bound_that_a_recipe_implies(
    federation: dict[str, Any], boundary: dict[str, Any], expected: float | None
) -> None:
    found = max_change(recipe_of(federation=federation, boundary=boundary), COUNT)
    assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("kind", ["adam", "adagrad", "momentum"])
@pytest.mark.parametrize("growing", [0.5, 1.0, 1.1, 0.9 / 0.99])
def test_no_honest_optimizer_exceeds_it(kind: str, growing: float) -> None:
    """Changes that grow, fall or stay, and those of adam's worst case."""
    recipe = recipe_of(federation={"optimizer": {"kind": kind}}, boundary={"update": {"clip": 1.0}})
    bound = max_change(recipe, COUNT)
    assert bound is not None
    optimizer = optimizer_of(recipe.federation.optimizer)
    assert optimizer is not None
    change_P = torch.full((COUNT,), 1 / math.sqrt(COUNT), dtype=torch.float64)
    sizes = [growing**n for n in range(60)]
    steps = [optimizer.step(change_P * size / max(sizes)) for size in reversed(sizes)]
    steps += [optimizer.step(change_P) for _ in range(60)]
    assert max(float(step.norm()) for step in steps) <= bound * (1 + 1e-9)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"optimizer": "adamw", "learning_rate": 0.01}, 0.01 * 0.1 / math.sqrt(0.001 * (1 - 0.81 / 0.999)) * 20),
        ({"optimizer": "adamw", "weight_decay": 0.1}, None),
        ({"optimizer": "sgd", "learning_rate": 0.5}, None),
        ({"optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": 3.0, "momentum": 0.5}, 3.0),
    ],
)
def test_the_bound_of_steps_with_gradients(train: dict[str, Any], expected: float | None) -> None:
    recipe = make_recipe(Path("model"), train=train | {"steps": 1}, federation={"updates": "gradients"})
    found = max_change(recipe, COUNT)
    assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("growing", [0.5, 1.0, 1.1, 0.9 / 0.999])
def test_no_honest_step_with_gradients_exceeds_it(growing: float) -> None:
    train = {"optimizer": "adamw", "learning_rate": 0.01, "steps": 1, "rounds": 200}
    recipe = make_recipe(Path("model"), train=train, federation={"updates": "gradients"})
    bound = max_change(recipe, COUNT)
    assert bound is not None
    optimizer, at = GradientOptimizer(recipe.train), {"x": torch.zeros(COUNT)}
    sizes = [growing**n for n in range(60)]
    for number, size in enumerate([*[size / max(sizes) for size in reversed(sizes)], *[1.0] * 60], 1):
        after = optimizer.step(at, {"x": torch.full((COUNT,), size)}, number)
        assert float((after["x"] - at["x"]).norm()) <= bound
        at = after


@pytest.mark.parametrize(
    ("federation", "boundary", "expected"),
    [
        ({}, {}, None),
        ({"max_change": 7.0}, {}, 7.0),
        ({"max_change": 7.0}, CLIPPED, 2.0),
        ({"max_change": 1.0}, CLIPPED, 1.0),
        ({"optimizer": {"kind": "momentum", "learning_rate": 0.5}}, CLIPPED, 2.0),
        ({"optimizer": {"kind": "momentum", "learning_rate": 0.5, "momentum": 0.5}, "max_change": 1.0}, {}, 3.0),
        ({"optimizer": {"kind": "adam"}, "max_change": 1.0}, {}, None),
        ({"optimizer": {"kind": "adam"}, "max_change": 1.0}, CLIPPED, 2.0),
        (MASKED, {}, 5.0),
    ],
)
def test_the_mean_of_a_rounds_updates(
    federation: dict[str, Any], boundary: dict[str, Any], expected: float | None
) -> None:
    assert max_mean(recipe_of(federation=federation, boundary=boundary), COUNT) == expected
