"""Silos' training frames computed together: what each gets and gives is what it would get and give alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import FrameError, UnknownStepError
from isthmus.trunk import training
from tests.oracle.twins import Tensors, assert_same, distance
from tests.unit.trunk.drill import LONG, NAMES, Drill, Drills, Work, decoded, recipe_of, results

TOLERANCE = 1e-5
SHORT = 0.3
WORKS: dict[str, list[Work]] = {
    "a": [(1, (3, 5)), (2, (40,)), (3, (1, 1))],
    "b": [(4, (4,)), (5, (2, 2, 6)), (6, (7,))],
    "c": [(7, (20, 1)), (8, (9,)), (9, (9,))],
    "d": [(10, (2,)), (11, (6, 6)), (12, (30, 2))],
}
"""The micro-batches of a step."""
FIRST = {name: works[0] for name, works in WORKS.items()}
REPLY = {"a": True, "b": False, "c": True, "d": False}
WEIGHTS = {"a": 3.0, "b": 1.0, "c": 5.0, "d": 2.0}


@pytest.fixture
def drills(model: Path, tmp_path: Path) -> Iterator[Drills]:
    built: list[Drill] = []

    def build(steps: int = 2, **trunk: Any) -> Drill:
        built.append(Drill(recipe_of(model, train={"steps": steps}, **trunk), tmp_path / str(len(built))))
        return built[-1]

    yield build
    for drill in built:
        drill.service.stop()


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps' backwards each run of autograd computed."""
    counted: list[int] = []
    gradients = training._gradients
    monkeypatch.setattr(
        training, "_gradients", lambda opened, given: (counted.append(len(opened)), gradients(opened, given))[1]
    )
    return counted


def train(drill: Drill, *, optimizer_steps: int = 2) -> Tensors:
    """Micro-batches of all silos, forwards first; returns all that came back, and the adapter after each step."""
    found: Tensors = {}
    drill.begin()
    for number in range(1, optimizer_steps + 1):
        with drill.held():
            there = {(name, work): drill.silos[name].forward(work) for name in NAMES for work in WORKS[name]}
        found |= {f"forward {number} {name} {work}": decoded(one) for (name, work), one in there.items()}
        with drill.held():
            back = {}
            for name in NAMES:
                silo, works = drill.silos[name], WORKS[name]
                for step, work in enumerate(works, silo.last - len(works) + 1):
                    back[name, work] = silo.backward(step, work, reply=REPLY[name])
        arrived = {f"backward {number} {name} {work}": decoded(one) for (name, work), one in back.items()}
        assert all((one is not None) == REPLY[name.split()[2]] for name, one in arrived.items())
        found |= {name: one for name, one in arrived.items() if one is not None}
        for name in NAMES:
            found |= {f"gradient {number} {name} {n}": one for n, one in enumerate(drill.gradients(name))}
        results([drill.silos[name].commit(number, WEIGHTS[name]) for name in NAMES])
        found |= {f"adapter {number} {name}": one for name, one in drill.adapter().items()}
    return found


def test_together_is_one_after_another(drills: Drills, backwards: list[int]) -> None:
    together = drills()
    got = train(together)
    assert [len(one) for one in together.passes] == 2 * [6, 7, 6]  # one pass of all silos a micro-batch
    assert backwards == 2 * [4, 4, 4]
    backwards.clear()
    alone = drills(together=1)
    expected = train(alone)
    assert len(alone.passes) == 24
    assert backwards == 24 * [1]
    assert_same(got, expected, TOLERANCE)


def test_no_more_silos_are_in_a_pass_than_may_be(drills: Drills, backwards: list[int]) -> None:
    some = drills(together=3, gather=SHORT)
    got = train(some, optimizer_steps=1)
    assert max(backwards) == 3
    assert max(len(one) for one in some.passes) < 7
    assert_same(got, train(drills(together=1), optimizer_steps=1), TOLERANCE)


def gradients_alone(drill: Drill, names: tuple[str, ...] = NAMES) -> dict[str, list[torch.Tensor]]:
    """Of the first micro-batch of these silos."""
    drill.begin()
    for name in names:
        drill.silos[name].work(FIRST[name])
    return {name: drill.gradients(name) for name in names}


def assert_gradients(drill: Drill, expected: dict[str, list[torch.Tensor]]) -> None:
    for name, wanted in expected.items():
        for one, other in zip(drill.gradients(name), wanted, strict=True):
            assert distance(one, other) <= TOLERANCE


def test_a_missing_forward_is_waited_for_no_longer_than_the_recipe_says(drills: Drills) -> None:
    drill = drills(gather=SHORT)
    drill.begin()
    began = time.monotonic()
    results([drill.silos[name].forward(FIRST[name]) for name in "abc"])
    assert SHORT <= time.monotonic() - began < LONG / 2
    assert len(drill.passes) == 1
    results([drill.silos["d"].forward(FIRST["d"])])
    assert drill.passes[1:] == [list(FIRST["d"][1])]


def test_a_late_backward_gives_its_right_gradient(drills: Drills, backwards: list[int]) -> None:
    drill = drills(gather=SHORT)
    drill.begin()
    with drill.held():
        forwards = [drill.silos[name].forward(FIRST[name]) for name in NAMES]
    results(forwards)
    began = time.monotonic()
    results([drill.silos[name].backward(1, FIRST[name]) for name in "abc"])
    assert SHORT <= time.monotonic() - began < LONG / 2
    assert backwards == [3]
    began = time.monotonic()
    late = decoded(drill.silos["d"].backward(1, FIRST["d"]))
    assert time.monotonic() - began < SHORT  # there is nobody left to wait for
    reference = drills(together=1)
    assert_gradients(drill, gradients_alone(reference))
    silo = reference.silos["d"]
    silo.forward(FIRST["d"])
    assert distance(late, decoded(silo.backward(silo.last, FIRST["d"]))) <= TOLERANCE


def test_a_silo_that_left_the_pass_is_not_waited_for(drills: Drills, backwards: list[int]) -> None:
    drill = drills()
    drill.begin()
    with drill.held():
        forwards = [drill.silos[name].forward(FIRST[name]) for name in NAMES]
    results(forwards)
    drill.service._scheduler.submit(lambda: drill.service._forget("d")).result(LONG)
    results([drill.silos[name].backward(1, FIRST[name]) for name in "abc"])
    assert backwards == [3]


def test_overflow_is_the_error_of_the_silo_that_sent_it(drills: Drills) -> None:
    drill = drills()
    drill.begin()
    with drill.held():
        forwards = [drill.silos[name].forward(FIRST[name]) for name in NAMES]
    results(forwards)
    with drill.held():
        answers = {name: drill.silos[name].backward(1, FIRST[name]) for name in "abd"}
        wrong = drill.silos["c"].backward(1, FIRST["c"], times=5e37)
    with pytest.raises(FrameError, match="the gradients of step 1 are not finite"):
        wrong.result(LONG)
    replies = {name: decoded(answer) for name, answer in answers.items()}
    assert all(reply is not None and reply.isfinite().all() for reply in replies.values())
    expected = gradients_alone(drills(together=1))
    assert_gradients(drill, {name: expected[name] for name in "abd"})
    results([drill.silos["c"].backward(1, FIRST["c"])])  # its step is open still
    assert_gradients(drill, expected)


def test_an_unknown_step_is_the_error_of_the_silo_that_named_it(drills: Drills, backwards: list[int]) -> None:
    drill = drills(gather=SHORT)
    drill.begin()
    with drill.held():
        forwards = [drill.silos[name].forward(FIRST[name]) for name in NAMES]
    results(forwards)
    with drill.held():
        wrong = [drill.silos[name].backward(9, FIRST[name]) for name in "ac"]
        answers = [drill.silos[name].backward(1, FIRST[name]) for name in "bd"]
    for answer in wrong:
        with pytest.raises(UnknownStepError, match="step 9 is not open"):
            answer.result(LONG)
    results(answers)
    results([drill.silos[name].backward(1, FIRST[name]) for name in "ac"])
    assert sum(backwards) == 4
    assert_gradients(drill, gradients_alone(drills(together=1)))


def test_a_forward_that_cannot_be_read_is_left_out(drills: Drills) -> None:
    drill = drills()
    drill.begin()
    with drill.held():
        good = [drill.silos[name].forward(FIRST[name]) for name in "abc"]
        wrong = drill.silos["d"].forward((10, (600,)))
    with pytest.raises(FrameError, match="context"):
        wrong.result(LONG)
    results(good)
    assert [len(one) for one in drill.passes] == [5]


@pytest.mark.parametrize(("together", "passes"), [(8, 1), (3, 2), (1, 4)])
def test_evaluations_that_wait_are_computed_together(drills: Drills, together: int, passes: int) -> None:
    drill = drills(together=together)
    with drill.held():
        answers = {name: drill.silos[name].forward(FIRST[name], train=False) for name in NAMES}
    got = {name: decoded(answer) for name, answer in answers.items()}
    assert len(drill.passes) == passes
    alone = {name: decoded(drill.silos[name].forward(FIRST[name], train=False)) for name in NAMES}
    assert_same(got, alone, TOLERANCE)


def test_evaluations_wait_for_nobody(drills: Drills) -> None:
    drill = drills()
    drill.begin()
    began = time.monotonic()
    decoded(drill.silos["a"].forward(FIRST["a"], train=False))
    assert time.monotonic() - began < LONG / 2
