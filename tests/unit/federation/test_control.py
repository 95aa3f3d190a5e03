"""The root's control: the mean of the silos' own, told with a plan and moved by the silos that were there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.errors import FrameError
from isthmus.federation.collection import Collected
from isthmus.federation.contribution import Contribution
from isthmus.federation.control import RootControl, root_control
from isthmus.recipe import Recipe
from isthmus.updates.flat import Layout
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import make_recipe

LAYOUT = Layout({"x": (3,)})
RATE, STEPS = 0.5, 4
SILOS = ("a", "b", "c", "d")


def recipe_of(control: str = "scaffold") -> Recipe:
    train = {"optimizer": "sgd", "learning_rate": RATE, "steps": STEPS}
    return make_recipe(Path("none"), silos=SILOS, train=train, federation={"control": control, "weights": "equal"})


def collected(**changes: float) -> Collected:
    learned = tuple(Contribution(name, 1.0, {"x": torch.full((3,), value)}) for name, value in changes.items())
    return Collected(dict.fromkeys(changes, 1.0), learned)


def told(control: RootControl) -> tuple[torch.Tensor, dict[str, int]]:
    plan = pb.Plan()
    control.add_to(plan, LAYOUT)
    return codec.decode_named(plan.control, LAYOUT.shapes)["x"], dict(plan.counted)


def test_only_scaffold_has_one() -> None:
    assert root_control(recipe_of("none")) is None
    assert isinstance(root_control(recipe_of()), RootControl)


def test_it_starts_at_nothing_and_becomes_the_mean_gradient() -> None:
    control = RootControl(recipe_of())
    assert told(control) == (pytest.approx(torch.zeros(3)), {})
    control.follow(1, collected(a=-2.0, b=-2.0, c=-6.0, d=-6.0), LAYOUT)
    mean, counted = told(control)
    assert mean.tolist() == [4.0 / (RATE * STEPS)] * 3, "minus the way that was gone, a step and rate"
    assert counted == dict.fromkeys(SILOS, 1)


def test_silos_that_were_not_there_keep_their_part() -> None:
    control = RootControl(recipe_of())
    control.follow(1, collected(a=-4.0, b=-4.0, c=-4.0, d=-4.0), LAYOUT)
    control.follow(2, collected(a=0.0), LAYOUT)
    mean, counted = told(control)
    assert mean.tolist() == [2.0 * 3 / 4] * 3
    assert counted == {"a": 2, "b": 1, "c": 1, "d": 1}
    control.follow(3, Collected({}, ()), LAYOUT)
    assert told(control)[1] == counted


def test_a_restart_forgets_nothing() -> None:
    control, again = RootControl(recipe_of()), RootControl(recipe_of())
    control.follow(1, collected(a=-4.0), LAYOUT)
    again.load_state_dict(control.state_dict())
    assert torch.equal(told(again)[0], told(control)[0])


def test_what_was_told_of_other_tensors_is_refused() -> None:
    plan = pb.Plan()
    RootControl(recipe_of()).add_to(plan, LAYOUT)
    with pytest.raises(FrameError):
        codec.decode_named(plan.control, {"x": (4,)})
