"""Steps by the gradient uphill: what crosses of the first pass, what it costs, and that it leaves nothing behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import RoundLostError
from isthmus.model import adapters
from isthmus.model.crossing import Outbound
from isthmus.privacy.accountant import Account
from isthmus.recipe import TrainSection
from isthmus.silo.local_steps import Ascent, LocalSteps
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import Step, train_step
from isthmus.storage.record import RunDirectory
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import make_recipe, save_tiny_model
from tests.features.silo.test_spent_budgets import (
    BATCH,
    CALIBRATED,
    COST,
    DELTA,
    ROUNDS,
    STEPS_A_ROUND,
    charged,
    federation_of,
)
from tests.features.silo.test_spent_budgets import federate as federate_spending
from tests.unit.silo.parties import ROWS, Party, batches

DISTANCE = 0.05
MakeParty = Callable[..., Party]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**32), st.floats(1e-3, 1.0))
def test_it_climbs_so_far_along_the_gradient_of_all_together(sizes: list[int], seed: int, distance: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=draw)) for size in (*sizes, 2)]
    places = [one.detach().clone() for one in parameters]
    for one in parameters[:-1]:  # the last one rests
        one.grad = torch.randn(one.shape, generator=draw)
    ascent = Ascent(parameters, distance)
    ascent.step()
    moved = torch.cat([(one - place).detach() for one, place in zip(parameters, places, strict=True)])
    uphill = torch.cat([*(one.grad for one in parameters[:-1]), torch.zeros(2)])
    torch.testing.assert_close(moved, distance * uphill / uphill.norm(), rtol=1e-3, atol=1e-6)
    ascent.undo()
    assert all(torch.equal(one, place) for one, place in zip(parameters, places, strict=True))


def test_where_it_is_flat_it_stays() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    ascent = Ascent([parameter], DISTANCE)
    ascent.step()
    parameter.grad = torch.zeros(3)
    ascent.step()
    assert torch.equal(parameter, torch.ones(3))


def sharp(party: Party, *, micro_batches: int = 1) -> Step:
    """One step of the silo on its first rows."""
    parameters = {name: one for part in party.silo.parts for name, one in adapters.trainable(part).items()}
    local = LocalSteps(parameters, TrainSection(optimizer="sgd", learning_rate=0.1, sharpness=DISTANCE))
    local.begin()

    def take(optimizer: torch.optim.Optimizer) -> Step:
        if micro_batches == 1:
            return train_step(party.silo.model, optimizer, batches(4)[0])
        return pipelined_step(party.silo.model, optimizer, batches(4)[0], micro_batches)

    return local.take(take, local.optimizer(), party.trunk)


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Any:
    made: list[Party] = []

    def party(**sections: Any) -> Party:
        boundary = {path: {"noise": 0.0} for path in ("forward", "gradient", "update")}
        sections["boundary"] = boundary | sections.pop("boundary", {})
        made.append(Party(make_recipe(folder, train={"steps": 99}, **sections), tmp_path / str(len(made))))
        return made[-1]

    yield party
    for one in made:
        one.service.stop()


FROZEN = {"lora": {"freeze_bottom": True}}
ONCE = {"boundary": {"release_once": True}, **FROZEN}
CASES = {
    "bottom trains": ({}, [(True, True), (True, False)]),
    "bottom is frozen": (FROZEN, [(False, None), (True, False)]),
    "released once": (ONCE, [(False, None), (True, False)]),
    "released once, residual": (
        {"boundary": {"release_once": True, "residual": True}, **FROZEN},
        [(False, None), (True, False)],
    ),
    "no gradients": ({"boundary": {"gradients": False, "residual": True}}, [(False, None), (False, None)]),
}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_of_the_first_pass_what_bottom_needs_comes_back(make: MakeParty, case: str, micro_batches: int) -> None:
    """By pass: whether the trunk keeps its graph, and whether the backward is ascent; None: there is none."""
    sections, expected = CASES[case]
    party = make(**sections)
    with torch.no_grad():
        loss = float(party.silo.model(**batches(4)[0].inputs(), use_cache=False).loss)
    party.forget()
    step = sharp(party, micro_batches=micro_batches)
    forwards, backwards = party.tap.take(pb.Forward), party.tap.take(pb.Backward)
    seen = []
    for number in range(2):
        own = forwards[number * micro_batches : (number + 1) * micro_batches]
        back = [one for one in backwards if one.step in {forward.step for forward in own}]
        seen.append(({one.train for one in own}, {one.ascent_pass for one in back} or {None}))
    assert seen == [({train}, {ascent}) for train, ascent in expected]
    assert step.loss == pytest.approx(loss, rel=1e-5)  # of before the ascent
    assert not any(state.open for state in party.service._training._silos.values())


def test_a_round_that_is_lost_uphill_leaves_the_parameters_where_they_were(make: MakeParty) -> None:
    party = make()
    parameters = {name: one for part in party.silo.parts for name, one in adapters.trainable(part).items()}
    places = {name: one.detach().clone() for name, one in parameters.items()}
    local = LocalSteps(parameters, TrainSection(sharpness=DISTANCE))
    local.begin()
    optimizer = local.optimizer()

    def take(one: torch.optim.Optimizer) -> Step:
        if one is optimizer:
            assert any(not torch.equal(tensor, places[name]) for name, tensor in parameters.items())
            raise RoundLostError("gone", remedy="ask for the next plan")
        return train_step(party.silo.model, one, batches(4)[0])

    with pytest.raises(RoundLostError):
        local.take(take, optimizer, party.trunk)
    assert all(torch.equal(tensor, places[name]) for name, tensor in parameters.items())
    assert party.trunk.wants_gradient(Outbound([1], None))


COSTS = {
    "bottom trains": ({}, {"forward": 2, "gradient": 2}),
    "bottom is frozen": (FROZEN, {"forward": 2, "gradient": 1}),
}


@pytest.mark.parametrize("case", COSTS)
def test_a_step_is_taken_where_both_its_passes_can_be_borne(folder: Path, tmp_path: Path, case: str) -> None:
    """Each row is drawn six times; its budget bears one step whole and half of another."""
    sections, cost = COSTS[case]
    charges = 1.5 * sum(cost.values()) * COST
    recipe = federation_of(
        folder,
        tmp_path,
        {"a": 4, "b": 4},
        train={"sharpness": 1e-3},
        privacy={"record_epsilon": Account(charges).epsilon(DELTA).value},
        **sections,
    )
    assert CALIBRATED["epsilon"] == recipe.boundary.forward.epsilon
    run = RunDirectory.create(tmp_path / "run", recipe)
    federate_spending(recipe, run)
    for name in ("a", "b"):
        counts = charged(run, name)
        for path, times in cost.items():
            assert len(counts[path]) == 4
            assert set(counts[path].values()) == {times}


def test_released_once_a_step_costs_its_gradient_alone(make: MakeParty) -> None:
    boundary = {"forward": CALIBRATED, "gradient": CALIBRATED, "release_once": True}
    party = make(boundary=boundary, privacy={"record_epsilon": Account(3 * COST).epsilon(DELTA).value}, **FROZEN)
    rows = [row.input for row in ROWS]
    for affordable in (True, True, False):  # a release and a gradient; a gradient; one too many
        assert party.boundary.affordable(rows, list(map(len, rows)), forwards=2) == [affordable] * 4
        if affordable:
            sharp(party)
    paths = Counter(release.path for release in party.ledger.releases)
    assert (paths["forward"], paths["gradient"]) == (len(ROWS), 2)


def test_all_rows_are_drawn_often_enough() -> None:
    assert ROUNDS * STEPS_A_ROUND * BATCH == 6 * 4
