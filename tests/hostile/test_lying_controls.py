"""A root that lies about SCAFFOLD's control, which each step of a silo follows: silos refuse one that no honest rounds
could have made, before anything crosses, and go on with an honest root.

Root, trunk and workers are the real ones; what the root answers is changed on its way out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import FrameError, IsthmusError, ProtocolError
from isthmus.recipe import Recipe
from isthmus.silo.control import SiloControl, silo_control
from isthmus.storage.record import RunDirectory
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import save_tiny_model
from tests.hostile.test_steering import ROUNDS, Lie, changed, honest, parties
from tests.hostile.test_steering import recipe_of as plain_recipe_of

SCAFFOLD: dict[str, Any] = {"control": "scaffold", "weights": "equal"}
MAX = 0.3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


def recipe_of(model: Path, place: Path, *, federation: dict[str, Any], **sections: Any) -> Recipe:
    plain = plain_recipe_of(model, place, **sections).model_dump(exclude_none=True)
    plain["train"] |= {"optimizer": "sgd"}
    plain["federation"] |= SCAFFOLD | federation
    return Recipe.of(plain)


def large(answer: Any) -> None:
    changed(answer.control, lambda _, tensor: tensor + 50.0)


def later(answer: Any) -> None:
    """The same once the silo has a control of its own."""
    if answer.completed:
        large(answer)


def in_one_number(answer: Any) -> None:
    changed(answer.control[:1], lambda _, tensor: tensor.index_fill(0, torch.tensor(0), 1e30))


def not_finite(answer: Any) -> None:
    changed(answer.control[-1:], lambda _, tensor: tensor + float("nan"))


def infinite(answer: Any) -> None:
    changed(answer.control[-1:], lambda _, tensor: tensor - float("inf"))


def larger(answer: Any) -> None:
    answer.control[0].shape[0] += 1


def less(answer: Any) -> None:
    del answer.control[0]


def none(answer: Any) -> None:
    del answer.control[:]


def twice(answer: Any) -> None:
    answer.control.append(answer.control[0])


def unknown(answer: Any) -> None:
    answer.control[0].name = "model.embed_tokens.weight"


LONGER = (ProtocolError, r"the control of round . has the norm .* this silo accepts 30")
LIES: dict[Lie, tuple[type[IsthmusError], str]] = {
    large: LONGER,
    later: LONGER,
    in_one_number: LONGER,
    not_finite: (FrameError, "the plan's control: .* holds NaN or infinity"),
    infinite: (FrameError, "the plan's control: .* holds NaN or infinity"),
    larger: (FrameError, "the plan's control: .* has shape"),
    less: (FrameError, "the plan's control: the tensor .* is missing"),
    none: (FrameError, "the plan's control: the tensor .* is missing"),
    twice: (FrameError, "the plan's control: received the unexpected tensor"),
    unknown: (FrameError, "the plan's control: received the unexpected tensor 'model.embed_tokens.weight'"),
}
BOUNDS: dict[str, dict[str, Any]] = {
    "max_change": {"federation": {"max_change": MAX}},
    "a clip": {"federation": {}, "boundary": {"update": {"clip": MAX, "noise": 0.0}}},
}


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_silo_computes_with_no_control_that_cannot_be(lie: Lie, bound: str, model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(model, tmp_path, **BOUNDS[bound])  # one step at a rate of 0.01: c is 30 at most
    run = RunDirectory.create(tmp_path / "run", recipe)
    error, told = LIES[lie]
    with parties(recipe, run, plans_alone(lie)) as (worker, way), pytest.raises(error, match=told) as refused:
        worker.run()
    assert way.crossed == (1 if lie is later else 0)  # an honest first round's, or nothing
    assert refused.value.remedy
    with parties(recipe, run, honest) as (worker, way):
        worker.run()  # with an honest root it goes on
    assert run.completed() == ROUNDS


def plans_alone(lie: Lie) -> Lie:
    def told(answer: Any) -> None:
        if isinstance(answer, pb.Plan) and answer.round:
            lie(answer)

    return told


def test_a_refused_control_changes_nothing_of_the_silos_own(model: Path, tmp_path: Path) -> None:
    """Else a root could have the silo count a round's change twice, or lose it."""
    recipe = recipe_of(model, tmp_path, federation={"max_change": MAX})
    control = silo_control(recipe, "a", 2)
    assert control is not None
    trained, good = {"x": torch.zeros(2)}, codec.encode_named({"x": torch.tensor([3.0, -4.0])})
    control.begin(pb.Plan(round=1, control=good), trained)
    control.end(1, {"x": torch.tensor([0.1, 0.2])})
    before = control.state_dict()
    for wrong in (torch.tensor([40.0, 0.0]), torch.tensor([float("nan"), 0.0])):
        with pytest.raises(IsthmusError):
            control.begin(pb.Plan(round=2, counted={"a": 1}, control=codec.encode_named({"x": wrong})), trained)
        assert control.state_dict() == before
    control.begin(pb.Plan(round=2, counted={"a": 1}, control=good), trained)
    assert control.state_dict()["own"]["x"].tolist() == pytest.approx([-3.0 - 10, 4.0 - 20])


def test_without_a_bound_of_the_recipe_any_finite_control_is_taken(model: Path, tmp_path: Path) -> None:
    control = SiloControl(recipe_of(model, tmp_path, federation={}), "a")
    control.begin(pb.Plan(control=codec.encode_named({"x": torch.tensor([1e30])})), {"x": torch.zeros(1)})
    with pytest.raises(FrameError):
        control.begin(pb.Plan(control=codec.encode_named({"x": torch.tensor([float("inf")])})), {"x": torch.zeros(1)})
