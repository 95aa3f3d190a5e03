"""Replicas of the trunk's adapter against a slow oracle: for each silo a part and an optimizer of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part
from isthmus.model.optim import build_optimizer
from isthmus.trunk.adapter import ReplicaAdapters
from tests.oracle.twins import Tensors, assert_same, distance
from tests.unit.trunk.drill import Drill, Drills, Work, decoded, recipe_of, results, tensors_of

SILOS = ("a", "b", "c")
STEPS = 5
SHORT = 0.05
TOLERANCE = {"sgd": 1e-5, "adamw": 1e-4}
"""Adam divides by tiny gradients, and so enlarges rounding."""


def work_of(name: str, round: int, step: int) -> list[Work]:
    """One or two micro-batches of ragged sequences."""
    seed = 1000 * round + 10 * step + SILOS.index(name)
    works = [(seed, (2 + seed % 5, 3)), (seed + 500, (4,))]
    return works[: 1 + (seed % 3 == 0)]


def weight_of(name: str, step: int) -> float:
    return 1.0 + SILOS.index(name) + 2 * (step % 2)


class Oracle:
    """Every silo's own copy of the trunk, averaged by hand."""

    def __init__(self, drill: Drill) -> None:
        self._train = drill.recipe.train
        self._every = drill.recipe.trunk.average_every or STEPS
        self.parts = {name: plain_copy(drill) for name in SILOS}
        self._optimizers = {
            name: build_optimizer(adapters.trainable(part).values(), self._train) for name, part in self.parts.items()
        }
        self._weights = dict.fromkeys(SILOS, 0.0)

    def step(self, round: int, step: int) -> None:
        for name, part in self.parts.items():
            for parameter, gradient in zip(
                adapters.trainable(part).values(), gradients(part, work_of(name, round, step)), strict=True
            ):
                parameter.grad = gradient
            self._optimizers[name].step()
            self._weights[name] += weight_of(name, step)
        if step % self._every == 0 or step == STEPS:
            self._average()

    def _average(self) -> None:
        total = sum(self._weights.values())
        own = {name: adapters.adapter_of(part) for name, part in self.parts.items()}
        mean = {key: sum(self._weights[name] / total * own[name][key] for name in SILOS) for key in own["a"]}
        for part in self.parts.values():
            adapters.load_adapter(part, {key: tensor for key, tensor in mean.items() if "lora_B" in key})
        self._weights = dict.fromkeys(SILOS, 0.0)


def plain_copy(drill: Drill) -> Part:
    model = drill.recipe.model
    part = load_part(Checkpoint(model.path), Cut(model.bottom, model.top), "trunk")
    adapters.add_adapter(part, drill.recipe.lora, drill.recipe.seed, freeze_a=True)
    adapters.load_adapter(part, drill.adapter())
    return part


def gradients(part: Part, works: list[Work]) -> list[torch.Tensor]:
    """Of B, summed over the sequences of these micro-batches."""
    part.zero_grad()
    for work in works:
        h_TD, gradient_TD = tensors_of(work)
        for h_ND, gradient in zip(h_TD.split(work[1]), gradient_TD.split(work[1]), strict=True):
            part.hidden(inputs_embeds=h_ND[None], use_cache=False)[0].backward(gradient)
    return [parameter.grad.clone() for parameter in adapters.trainable(part).values()]


@pytest.fixture
def drills(model: Path, tmp_path: Path) -> Iterator[Drills]:
    built: list[Drill] = []

    def build(
        folder: str = "run", optimizer: str = "sgd", steps: int = STEPS, rate: float = 1e-3, **trunk: Any
    ) -> Drill:
        train = {"steps": steps, "optimizer": optimizer, "learning_rate": rate}
        recipe = recipe_of(model, silos=SILOS, train=train, adapter="replica", **trunk)
        built.append(Drill(recipe, tmp_path / folder))
        return built[-1]

    yield build
    for drill in built:
        drill.service.stop()


def replica_of(drill: Drill, name: str) -> Tensors:
    """What this silo's tokens go through now."""
    adapter = drill.service._training._adapter
    assert isinstance(adapter, ReplicaAdapters)
    return {key: one.detach() for key, one in (adapters.adapter_parameters(drill.part) | adapter.leaves(name)).items()}


def work_together(drill: Drill, works: dict[str, list[Work]]) -> None:
    """Of all silos at once; those with fewer micro-batches are not waited for."""
    with drill.held():
        forwards = [drill.silos[name].forward(work) for name, own in works.items() for work in own]
    results(forwards)
    with drill.held():
        backwards = [
            drill.silos[name].backward(drill.silos[name].last - len(own) + place, work)
            for name, own in works.items()
            for place, work in enumerate(own, 1)
        ]
    results(backwards)


def step_together(drill: Drill, round: int, step: int) -> list[int]:
    """One step of all; returns how many contributed to each silo's."""
    work_together(drill, {name: work_of(name, round, step) for name in SILOS})
    answers = results(drill.silos[name].commit(step, weight_of(name, step), round) for name in SILOS)
    return [answer.contributors for answer in answers]


def whole_round(drill: Drill, round: int) -> None:
    drill.begin(round, SILOS)
    for step in range(1, STEPS + 1):
        step_together(drill, round, step)


@pytest.mark.parametrize("optimizer", TOLERANCE)
@pytest.mark.parametrize("every", [1, 2, 3, 9, None])
def test_replicas_are_parts_of_their_own_with_their_means(drills: Drills, optimizer: str, every: int | None) -> None:
    # gradients are of hundreds: at 1e-3 ten steps of SGD enlarge rounding to 1e-5
    drill = drills(optimizer=optimizer, rate=3e-4, gather=SHORT / 5, average_every=every)
    oracle, start = Oracle(drill), drill.adapter()
    for round in (1, 2):
        drill.begin(round, SILOS)
        for step in range(1, STEPS + 1):
            averages = step % (every or STEPS) == 0 or step == STEPS
            assert step_together(drill, round, step) == [3 if averages else 1] * 3
            oracle.step(round, step)
            for name, part in oracle.parts.items():
                assert_same(replica_of(drill, name), adapters.adapter_of(part), TOLERANCE[optimizer])
            if averages:
                assert_same(drill.adapter(), adapters.adapter_of(oracle.parts["a"]), TOLERANCE[optimizer])
    end = drill.adapter()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {name for name in start if "lora_B" in name}


def test_steps_between_averages_wait_for_nobody(drills: Drills) -> None:
    drill = drills(gather=SHORT, average_every=2)
    drill.begin(1, SILOS)
    silo, others = drill.silos["a"], [drill.silos[name] for name in "bc"]
    silo.work((1, (3,)))
    assert results([silo.commit(1, 1.0)])[0].contributors == 1
    silo.work((2, (3,)))
    waiting = silo.commit(2, 1.0)
    for other in others:
        other.work((3, (3,)))
        assert results([other.commit(1, 1.0)])[0].contributors == 1
        assert not waiting.done()
        other.work((4, (3,)))
    assert {one.contributors for one in results([*[other.commit(2, 1.0) for other in others], waiting])} == {3}


def optimizer_states(drill: Drill) -> dict[str, Any]:
    states: dict[str, Any] = copy.deepcopy(drill.service._training._adapter.state()["optimizers"])
    return states


@pytest.mark.parametrize("way", ["new-process", "restore", "begin"])
def test_a_round_done_again_is_the_same_exactly(drills: Drills, way: str) -> None:
    drill = drills(optimizer="adamw", together=1, average_every=2)
    whole_round(drill, 1)
    first, states = drill.adapter(), optimizer_states(drill)
    whole_round(drill, 2)
    second, later = drill.adapter(), optimizer_states(drill)
    if way == "new-process":
        drill.service.stop()
        drill = drills(optimizer="adamw", together=1, average_every=2)
        assert_same(drill.adapter(), second, 0.0)
    if way != "begin":
        drill.service.restore(1)
        assert_same(drill.adapter(), first, 0.0)
        assert_same_states(optimizer_states(drill), states)
    else:  # within the round, whose steps are void with its new begin
        drill.begin(3, SILOS)
        drill.silos["a"].work((9, (3,)))
        results([drill.silos["a"].commit(1, 1.0, 3)])
    whole_round(drill, 2)
    assert_same(drill.adapter(), second, 0.0)
    assert_same_states(optimizer_states(drill), later)


def assert_same_states(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """AdamW's state of every silo, bit for bit."""
    assert actual.keys() == expected.keys() == set(SILOS)
    for name in SILOS:
        own, other = actual[name]["state"], expected[name]["state"]
        assert own.keys() == other.keys() != set()
        assert all(torch.equal(own[n][key], value) for n, values in other.items() for key, value in values.items())
    steps = expected["a"]["state"][0]["exp_avg"]
    assert not torch.equal(steps, expected["b"]["state"][0]["exp_avg"])


def test_a_step_alone_leaves_the_graph_of_a_shared_pass_as_it_was(drills: Drills) -> None:
    drill = drills(gather=SHORT)
    part, work = plain_copy(drill), (7, (3, 4))
    drill.begin(1, SILOS)
    a, b = drill.silos["a"], drill.silos["b"]
    a.work((1, (5,)))
    with drill.held():
        forwards = [a.forward((2, (5,))), b.forward(work)]
    results(forwards)
    results([a.commit(1, 1.0)])  # a's forward is void with that; b's graph is the same pass's
    results([b.backward(b.last, work)])
    for got, expected in zip(drill.gradients("b"), gradients(part, [work]), strict=True):
        assert distance(got, expected) <= TOLERANCE["sgd"]
    with drill.held():
        forwards = [a.forward((4, (5,))), b.forward(work)]
    results(forwards)
    results([a.backward(a.last, (4, (5,)))])
    results([a.commit(2, 1.0)])  # now the graph is spent as well
    results([b.backward(b.last, work)])
    for got, expected in zip(drill.gradients("b"), gradients(part, [work]), strict=True):
        assert distance(got, 2 * expected) <= TOLERANCE["sgd"]


def two_steps(drill: Drill, name: str, steps: tuple[int, ...] = (1, 2)) -> int:
    """Returns how many contributed to the last."""
    silo = drill.silos[name]
    for step in steps:
        silo.work(*work_of(name, 1, step))
        (stepped,) = results([silo.commit(step, weight_of(name, step))])
    contributors: int = stepped.contributors
    return contributors


def stepped_by_hand(part: Part, name: str) -> Tensors:
    """The part's B after two steps of SGD, less what they were."""
    before, named = adapters.adapter_of(part), adapters.trainable(part)
    for step in (1, 2):
        for parameter, gradient in zip(named.values(), gradients(part, work_of(name, 1, step)), strict=True):
            parameter.data -= 1e-3 * gradient
    return {key: parameter.detach() - before[key] for key, parameter in named.items()}


def test_a_silo_late_for_an_average_keeps_what_it_did_and_brings_it_to_the_next(drills: Drills) -> None:
    drill = drills(gather=SHORT, steps=4, average_every=2, patience=SHORT)
    change = {name: stepped_by_hand(plain_copy(drill), name) for name in "ab"}
    start = {key: tensor for key, tensor in drill.adapter().items() if "lora_B" in key}
    drill.begin(1, ("a", "b"))
    two_steps(drill, "b", (1,))
    assert two_steps(drill, "a") == 1  # nobody else came
    moved = {key: drill.adapter()[key] - tensor for key, tensor in start.items()}
    assert_same(moved, change["a"], 1e-4)
    assert_same({key: replica_of(drill, "a")[key] for key in start}, {key: drill.adapter()[key] for key in start}, 0.0)
    assert two_steps(drill, "b", (2,)) == 1
    moved = {key: drill.adapter()[key] - tensor for key, tensor in start.items()}
    assert_same(moved, {key: change["a"][key] + change["b"][key] for key in start}, 1e-4)
    for name in "ab":
        assert_same(replica_of(drill, name), drill.adapter(), 0.0)


def test_what_a_silo_did_after_the_last_average_is_dropped_when_a_round_begins(drills: Drills) -> None:
    drill = drills(gather=SHORT, steps=2, patience=SHORT)
    drill.begin(1, ("a", "b"))
    two_steps(drill, "b", (1,))
    two_steps(drill, "a")
    assert not torch.equal(*(torch.cat([t.ravel() for t in replica_of(drill, name).values()]) for name in "ab"))
    drill.begin(2, SILOS)
    for name in SILOS:
        assert_same(replica_of(drill, name), drill.adapter(), 0.0)


def test_evaluation_goes_through_the_last_average(drills: Drills) -> None:
    drill = drills(gather=SHORT, average_every=2)
    drill.begin(1, SILOS)
    work = (5, (6,))
    before = decoded(drill.silos["a"].forward(work, train=False))
    step_together(drill, 1, 1)
    assert torch.equal(decoded(drill.silos["a"].forward(work, train=False)), before)
    step_together(drill, 1, 2)
    assert not torch.equal(decoded(drill.silos["a"].forward(work, train=False)), before)
