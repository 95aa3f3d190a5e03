"""Server optimizers against the papers' formulas written out number by number, torch's own where it has them, and a
root that starts again in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.federation.planner import RootPlanner
from isthmus.federation.rounds import Rounds
from isthmus.federation.strategies.optimizers import GradientOptimizer, optimizer_of
from isthmus.recipe import OptimizerSection, TrainSection
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RoleDirectory
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from tests.clock import Clock
from tests.conftest import make_recipe

KINDS = ("momentum", "adagrad", "adam", "yogi")
SHAPES = {"x": (2, 3), "y": (4,)}
Changes = list[torch.Tensor]


@st.composite
def changes(draw: st.DrawFn) -> Changes:
    """Of some rounds, fp64; adapters' changes are small and of many sizes."""
    size, rounds = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = 10.0 ** draw(st.integers(-4, 1))
    return [scale * torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(rounds)]


def section(kind: str, **told: float) -> OptimizerSection:
    return OptimizerSection.model_validate({"kind": kind, **told})


def steps_of(asked: OptimizerSection, given: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    optimizer = optimizer_of(asked)
    assert optimizer is not None
    return [optimizer.step(change_P) for change_P in given]


def written_out(kind: str, rate: float, beta1: float, beta2: float, tau: float, given: list[float]) -> list[float]:
    """Reddi et al. (2021), algorithm 2, for one parameter."""
    m, v, steps = 0.0, tau**2, []
    for change in given:
        m = beta1 * m + (1 - beta1) * change
        if kind == "adagrad":
            v = v + change**2
        elif kind == "adam":
            v = beta2 * v + (1 - beta2) * change**2
        else:
            v = v - (1 - beta2) * change**2 * ((v > change**2) - (v < change**2))
        steps.append(rate * m / (math.sqrt(v) + tau))
    return steps


@given(changes(), st.floats(0.0, 0.99), st.floats(0.01, 0.999), st.floats(1e-6, 1.0), st.floats(1e-4, 10.0))
def test_adaptive_steps_are_the_papers(given: Changes, beta1: float, beta2: float, tau: float, rate: float) -> None:
    both = {"learning_rate": rate, "adaptivity": tau}
    for kind in ("adagrad", "adam", "yogi"):
        told = both if kind == "adagrad" else both | {"momentum": beta1, "second_momentum": beta2}
        steps = steps_of(section(kind, **told), given)
        for place in range(len(given[0])):
            row = [float(change_P[place]) for change_P in given]
            expected = written_out(kind, rate, 0.0 if kind == "adagrad" else beta1, beta2, tau, row)
            assert [float(step_P[place]) for step_P in steps] == pytest.approx(expected, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("momentum", lambda p: torch.optim.SGD([p], lr=0.5, momentum=0.8)),
        ("adagrad", lambda p: torch.optim.Adagrad([p], lr=0.5, initial_accumulator_value=0.01**2, eps=0.01)),
    ],
)
@settings(max_examples=30)
@given(given=changes())
def test_steps_are_torchs_where_it_has_the_formula(
    kind: str, own: Callable[[torch.nn.Parameter], torch.optim.Optimizer], given: Changes
) -> None:
    told = {"momentum": {"momentum": 0.8}, "adagrad": {"adaptivity": 0.01}}[kind]
    rate = {"learning_rate": 0.5}
    parameter = torch.nn.Parameter(torch.zeros_like(given[0]))
    optimizer = own(parameter)
    moved_P = torch.zeros_like(given[0])
    for change_P, step_P in zip(given, steps_of(section(kind, **told, **rate), given), strict=True):
        parameter.grad = -change_P
        optimizer.step()
        moved_P += step_P
        torch.testing.assert_close(moved_P, parameter.detach())


@pytest.mark.parametrize("kind", KINDS)
@given(given=changes())
def test_the_changes_stay_as_they_are_and_so_do_earlier_steps(kind: str, given: Changes) -> None:
    optimizer, kept = optimizer_of(section(kind)), [change_P.clone() for change_P in given]
    assert optimizer is not None
    steps = [(step_P, step_P.clone()) for step_P in (optimizer.step(change_P) for change_P in given)]
    assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True))
    assert all(torch.equal(one, other) for one, other in steps)


@pytest.mark.parametrize("kind", KINDS[1:])
@given(given=changes())
def test_a_scaled_step_stays_about_as_large_as_the_rate(kind: str, given: Changes) -> None:
    """Whatever a silo sends, the first round's step is bounded: rate/√(1 - β₂) for what is far above τ, or less."""
    (step_P,) = steps_of(section(kind, learning_rate=0.1), given[:1])
    assert step_P.abs().max() <= 0.1 / (1 - 0.99) ** 0.5


# --- with the rounds


def train(rounds: Rounds, numbers: Iterable[int], clock: Clock, silos: tuple[str, ...] = ("a", "b")) -> None:
    """In each of these rounds each silo learns something of its own; nobody else is waited for."""
    for number in numbers:
        answers = [rounds.ready(silo, pb.Ready()) for silo in silos]
        clock.run_out()
        assert all(answer.result(60).round == number for answer in answers)
        for place, silo in enumerate(silos):
            draw = torch.Generator().manual_seed(10 * number + place)
            change = {name: 0.01 * torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
            update = pb.Update(
                round=number, weight=place + 1, tensors=codec.encode_named(change), quality=0.5 + place / 4
            )
            rounds.contribute(silo, update).result(60)


def shared_of(store: RoleDirectory, number: int) -> dict[str, Any]:
    shared: dict[str, Any] = store.load_round(number)["shared"]
    return shared


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_a_root_that_starts_again_goes_on_as_if_it_had_not(tmp_path: Path, kind: str, clock: Clock) -> None:
    """What the optimizer and the history of who took part remember is on the disk with each round."""
    silos = [{"name": name, "train": "t.jsonl", "held_out": "h.jsonl"} for name in ("a", "b", "c")]
    federation, root = {"optimizer": kind, "weights": "quality"}, {"minimum": 2}
    recipe = make_recipe(Path("none"), silo=silos, federation=federation, root=root, train={"rounds": 5})
    initial = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    whole, cut = RoleDirectory(tmp_path / "whole"), RoleDirectory(tmp_path / "cut")
    for store, lives in ((whole, [range(1, 6)]), (cut, [range(1, 4), range(4, 6)])):
        for life in lives:
            rounds = Rounds(recipe, RootPlanner(recipe, initial, store))
            for number in life:  # c comes in the third round only
                train(rounds, [number], clock, ("c", "a", "b") if number == 3 else ("a", "b"))
    for number in range(1, 6):
        assert all(torch.equal(shared_of(whole, number)[name], shared_of(cut, number)[name]) for name in SHAPES)
    assert [line["shares"] for line in read_journal(whole.path / "metrics.jsonl")] == [
        line["shares"] for line in read_journal(cut.path / "metrics.jsonl")
    ]
    forgetful = RootPlanner(recipe, shared_of(whole, 3), RoleDirectory(tmp_path / "fresh"))
    assert forgetful._sharing.state_dict() != whole.load_round(3)["sharing"]


def test_a_round_of_nobody_moves_nothing_however_much_momentum_there_is(tmp_path: Path, clock: Clock) -> None:
    federation = {"optimizer": "momentum"}
    recipe = make_recipe(Path("none"), silos=("a",), federation=federation, train={"rounds": 3, "evaluate": False})
    store = RoleDirectory(tmp_path)
    rounds = Rounds(recipe, RootPlanner(recipe, {name: torch.zeros(shape) for name, shape in SHAPES.items()}, store))
    train(rounds, [1], clock, ("a",))
    rounds.ready("a", pb.Ready()).result(60)
    rounds.contribute("a", pb.Update(round=2)).result(60)
    assert torch.equal(shared_of(store, 1)["x"], shared_of(store, 2)["x"])
    train(rounds, [3], clock, ("a",))
    assert not torch.equal(shared_of(store, 2)["x"], shared_of(store, 3)["x"])


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_step_with_gradients_is_torchs_on_the_mean(kind: str) -> None:
    """With decay of matrices alone, a clip of the norm of all, a schedule, and a root that starts again in between."""
    told = {"optimizer": kind, "learning_rate": 0.1, "weight_decay": 0.1, "max_grad_norm": 0.5, "schedule": "cosine"}
    train = TrainSection.model_validate({**told, "rounds": 6} | ({"momentum": 0.9} if kind == "sgd" else {}))
    generator = torch.Generator().manual_seed(3)
    start = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    mine = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    groups: Any = [{"params": [mine["x"]]}, {"params": [mine["y"]], "weight_decay": 0.0}]
    torchs = (
        torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
        if kind == "adamw"
        else torch.optim.SGD(groups, lr=0.1, weight_decay=0.1, momentum=0.9)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(torchs, lambda done: 0.5 * (1 + math.cos(math.pi * done / 6)))
    asked, at = GradientOptimizer(train), start
    for round in range(1, 7):
        gradients = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        at = asked.step(at, {name: -one.double() for name, one in gradients.items()}, round)
        for name, gradient in gradients.items():
            mine[name].grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(mine.values(), 0.5)
        torchs.step()
        schedule.step()
        for name, tensor in at.items():
            torch.testing.assert_close(tensor, mine[name].detach())
        again = GradientOptimizer(train)
        again.load_state_dict(asked.state_dict())
        asked = again
