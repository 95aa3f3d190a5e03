"""``[train]``: its checks, and how far so many steps go."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from isthmus.recipe import Recipe, TrainSection
from tests.unit.recipe.refusals import OUT, Case, assert_mended, changed, least, name_of, refused

REFUSED: list[Case] = [
    (
        {"train.momentum": 0.9},
        "train.momentum: 'adamw' has its own averages",
        "set train.optimizer = 'sgd'",
        {"train.optimizer": "sgd"},
    ),
    ({"train.momentum": 0.9}, "train.momentum", "leave momentum out", {"train.momentum": OUT}),
    (
        {"train.optimizer": "sgd", "train.learning_rate": 0.1, "train.proximal": 10.0},
        "train.proximal: with a learning rate of 0.1",
        "less than 10",
        {"train.proximal": 9.9},
    ),
    (
        {"train.warmup": 40, "train.rounds": 4, "train.steps": 10},
        "train.warmup: 40 steps of warm-up, but the run has 40",
        "lower train.warmup",
        {"train.warmup": 39},
    ),
    (
        {"train.most_rows": 5},
        "train.most_rows: only train.epochs makes steps of rows",
        "set train.epochs",
        {"train.epochs": 2},
    ),
    (
        {"train.epochs": 2, "train.steps": 5},
        "train.epochs: silos take as many steps as their rows need",
        "leave train.steps out",
        {"train.steps": OUT},
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_impossible_steps_are_refused(case: Case) -> None:
    assert_mended(case)


def test_by_default_steps_are_the_optimizers_alone() -> None:
    train = TrainSection()
    assert (train.momentum, train.proximal, train.sharpness) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("proximal", value) for value in (-1e-9, -1.0, math.nan, math.inf, "0.1", True)],
        *[("sharpness", value) for value in (-0.05, math.nan, -math.inf, "much", False)],
        *[("momentum", value) for value in (-0.1, 1.0, 1.5, math.nan)],
        *[("schedule", value) for value in ("step", 1, True)],
        *[(key, value) for key in ("warmup", "weight_decay") for value in (-0.1, math.nan, math.inf, "some")],
        *[("max_grad_norm", value) for value in (0.0, -1.0, math.nan)],
    ],
)
def test_a_wrong_value_names_its_key(key: str, value: Any) -> None:
    error = refused(changed(least(), {f"train.{key}": value}))
    assert error.message.startswith(f"train.{key} = ")
    assert error.remedy == f"correct the value of train.{key}"


@given(st.integers(1, 60), st.floats(1e-4, 0.5), st.floats(1e-3, 0.99))
def test_steps_reach_as_far_as_fednova_says(steps: int, rate: float, shrinks: float) -> None:
    """Under a pull, so far from its start as a silo goes by a gradient of one; else one a step."""
    pulled = TrainSection(optimizer="sgd", learning_rate=rate, proximal=shrinks / rate)
    w = 0.0
    for _ in range(steps):
        w -= rate * (1.0 + pulled.proximal * w)
    assert pulled.reach([rate] * steps) == pytest.approx(-w / rate, rel=1e-6)
    for other in (TrainSection(proximal=5.0), TrainSection(optimizer="sgd", momentum=0.9, proximal=5.0)):
        assert other.reach([other.learning_rate] * steps) == steps
    plain = TrainSection(optimizer="sgd")
    assert plain.reach([plain.learning_rate] * steps) == steps


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.one_of(st.integers(0, 9).map(float), st.floats(0, 0.99)),
    st.integers(10, 60),
)
def test_rates_are_those_of_transformers_schedules(schedule: str, warmup: float, total: int) -> None:
    train = TrainSection(schedule=schedule, warmup=warmup, learning_rate=0.3)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    warm = int(warmup) if warmup >= 1 else math.ceil(total * warmup)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=total)
    for step in range(1, total + 1):
        assert train.rate(step, total) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_a_rate_follows_from_round_and_step() -> None:
    """A silo's own steps; of a step of several silos that of the one with most steps in a round."""
    values = {"train.schedule": "linear", "train.rounds": 2, "train.steps": 4, "train.learning_rate": 0.8}
    recipe = Recipe.of(changed(least(), values | {"silo.0.steps": 2}))
    a, b, c = (recipe.round_steps(name, 2) for name in "abc")
    assert recipe.rates(recipe.round_steps("a", 1)) + recipe.rates(a) == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert recipe.rates(b) == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert recipe.rate([(a, 2), (b, 1)]) == pytest.approx(0.4)
    assert recipe.rate([(b, 2), (c, 3)]) == pytest.approx(0.2)
    assert recipe.train.reach(recipe.rates(b)) == pytest.approx((0.4 + 0.3 + 0.2 + 0.1) / 0.8)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.integers(1, 7))
def test_passes_are_divided_evenly_among_the_rounds(rows: int, epochs: int, batch: int, rounds: int) -> None:
    recipe = Recipe.of(changed(least(), {"train.epochs": epochs, "train.batch": batch, "train.rounds": rounds}))
    plans = [recipe.round_steps("a", round, rows) for round in range(1, rounds + 1)]
    assert sum(plan.count for plan in plans) == plans[0].total == epochs * math.ceil(rows / batch)
    assert [plan.before for plan in plans] == [sum(one.count for one in plans[:at]) for at in range(rounds)]
    assert max(plan.count for plan in plans) - min(plan.count for plan in plans) <= 1


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.integers(1, 7))
def test_no_silo_of_so_many_rows_weighs_more_in_any_round(rows: int, epochs: int, batch: int, rounds: int) -> None:
    """And one with as many as it may have weighs as much in one round, if all are as long as they may be."""
    values = {"train.epochs": epochs, "train.batch": batch, "train.rounds": rounds, "train.most_rows": rows}
    recipe = Recipe.of(changed(least(), values | {"silo.1.most_rows": 2 * rows}))
    for name, most in (("a", rows), ("b", 2 * rows)):
        assert recipe.most_rows(name) == most
        plans = [recipe.round_steps(name, round, most) for round in range(1, rounds + 1)]
        heaviest = max(plan.count for plan in plans) * recipe.train.step_tokens
        assert recipe.most_weight([name]) == heaviest
        assert recipe.most_run_steps(name) == plans[0].total
    assert recipe.most_weight("ab") == recipe.most_weight("a") + recipe.most_weight("b")


@pytest.mark.parametrize(
    ("when", "measured"),
    [(False, []), (True, [0, 1, 2, 3, 4, 5]), ("end", [0, 5]), (2, [0, 2, 4, 5]), (5, [0, 5]), (9, [0, 5])],
)
def test_when_held_out_rows_are_measured(when: Any, measured: list[int]) -> None:
    section = TrainSection(rounds=5, evaluate=when)
    assert [round for round in range(6) if section.evaluates_after(round)] == measured
    kept = [round for round in range(6) if section.keeps(round)]
    assert kept == ([] if when in (False, "end") else measured)


@given(rounds=st.integers(1, 5000), every=st.none() | st.just(True) | st.integers(1, 700))
def test_of_measured_rounds_about_ten_are_kept_whatever_the_run_is_long(rounds: int, every: int | None) -> None:
    section = TrainSection(rounds=rounds, evaluate=every)
    measured = [round for round in range(rounds + 1) if section.evaluates_after(round)]
    kept = [round for round in range(rounds + 1) if section.keeps(round)]
    assert set(kept) <= set(measured)
    assert {0, rounds} <= set(kept)
    assert len(kept) == len(measured) or 6 <= len(kept) <= 12
    apart = [later - earlier for earlier, later in itertools.pairwise(kept[:-1])]
    assert len(set(apart)) <= 1


@pytest.mark.parametrize(("rounds", "every"), [(3, 1), (10, 1), (19, 1), (20, 2), (45, 4)])
def test_the_best_round_is_one_of_about_ten(rounds: int, every: int) -> None:
    section = TrainSection(rounds=rounds, evaluate="best")
    measured = [round for round in range(rounds + 1) if section.evaluates_after(round)]
    assert measured == sorted({*range(0, rounds, every), rounds})
    assert [round for round in range(rounds + 1) if section.keeps(round)] == measured
