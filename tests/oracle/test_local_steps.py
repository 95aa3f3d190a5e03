"""FedProx, SCAFFOLD, FedNova, SAM and their mixtures against each paper's rule written out on whole models.

Every silo has an uncut model of its own; what the trunk holds is one set of tensors, stepped by the mean gradient of
those silos that still have steps to take.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import collate
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import load_tokenizer
from isthmus.storage.record import RunDirectory
from tests.conftest import uncut
from tests.oracle.conftest import Models
from tests.oracle.test_federation import SILOS, federate, federation_of
from tests.oracle.twins import Tensors, assert_same, distance, load_lora, lora_of, with_lora

STEPS = 3
RATE = 5e-4
PULL = 100.0
"""μ: each step takes a twentieth of the way back."""
DISTANCE = 0.02
UNEVEN = {"north": 1, "east": 3, "south": 2, "west": 3}
ROUNDS = 3
NEAR = 3e-5
EVEN = dict.fromkeys(SILOS, STEPS)


def recipe_of(
    model: Path, folder: Path, steps: dict[str, int], *, lora: str = "frozen-a", **sections: dict[str, Any]
) -> Recipe:
    values = federation_of(model, folder, lora=lora).model_dump(exclude_none=True)
    for key, changed in sections.items():
        values[key] |= changed
    values["train"] |= {"steps": STEPS, "learning_rate": RATE}
    for silo in values["silo"]:
        silo["steps"] = steps[silo["name"]]
    return Recipe.of(values)


@dataclass
class Own:
    """One silo's side of the oracle."""

    inputs: dict[str, Any]
    tokens: int
    steps: int
    ends: Tensors = field(default_factory=dict)
    control: Tensors = field(default_factory=dict)
    velocity: Tensors = field(default_factory=dict)


class Oracle:
    """Slow and plain. w: what the ends are; μ, ρ, η, c, τ as in the papers."""

    def __init__(self, recipe: Recipe, start: Tensors, trunk: set[str]) -> None:
        self.recipe, self.train = recipe, recipe.train
        self.trunk = {name: tensor.clone() for name, tensor in start.items() if name in trunk}
        self.shared = {name: tensor.clone() for name, tensor in start.items() if name not in trunk}
        self.whole: PeftModel = with_lora(uncut(Path(recipe.model.path)), recipe)
        self.c = {name: torch.zeros_like(tensor) for name, tensor in self.shared.items()}
        self.trunk_velocity: Tensors = {}
        tokenizer = load_tokenizer(Path(recipe.model.path))
        self.silos: dict[str, Own] = {}
        for section in recipe.silo:
            data = SiloData(section, recipe, tokenizer)
            batch = collate(data.train, data.pad)
            self.silos[section.name] = own = Own(batch.inputs(), batch.supervised, recipe.steps(section.name))
            own.control = {name: torch.zeros_like(tensor) for name, tensor in self.shared.items()}

    def gradient(self, own: Own, ends: Tensors) -> Tensors:
        load_lora(self.whole, {**self.trunk, **ends})
        self.whole.zero_grad()
        self.whole(**own.inputs).loss.backward()
        return {name: one.grad.clone() for name, one in lora_of(self.whole).items()}

    def sharp(self, own: Own, trained: set[str]) -> Tensors:
        """SAM: the gradient at w + ρ·g/‖g‖, g of the ends alone."""
        g, rho = self.gradient(own, own.ends), self.train.sharpness
        if not rho:
            return g
        norm = torch.cat([g[name].flatten() for name in sorted(trained)]).norm()
        return self.gradient(own, own.ends | {name: own.ends[name] + rho * g[name] / norm for name in trained})

    def moved(self, tensors: Tensors, g: Tensors, velocity: Tensors) -> Tensors:
        for name in g:
            velocity[name] = self.train.momentum * velocity.get(name, torch.zeros_like(g[name])) + g[name]
        return {name: tensors[name] - RATE * velocity[name] for name in g}

    def local_round(self, trained: set[str]) -> None:
        for own in self.silos.values():
            own.ends = dict(self.shared)
        for number in range(max(own.steps for own in self.silos.values())):
            at_work = [own for own in self.silos.values() if number < own.steps]
            gradients = [self.sharp(own, trained) for own in at_work]
            total = sum(own.tokens for own in at_work)
            for own, g in zip(at_work, gradients, strict=True):
                pulled = {
                    name: g[name]
                    + self.train.proximal * (own.ends[name] - self.shared[name])
                    - own.control[name]
                    + self.c[name]
                    for name in trained
                }
                own.ends = own.ends | self.moved(own.ends, pulled, own.velocity)
            pairs = list(zip(at_work, gradients, strict=True))
            mean = {name: sum(own.tokens / total * g[name] for own, g in pairs) for name in self.trunk}
            self.trunk = self.moved(self.trunk, mean, self.trunk_velocity)

    def aggregate(self, trained: set[str]) -> None:
        federation, shared = self.recipe.federation, self.shared
        counts = dict.fromkeys(self.silos, 1.0)
        if federation.weights.kind == "examples":
            counts = {name: float(own.tokens * own.steps) for name, own in self.silos.items()}
        p = {name: count / sum(counts.values()) for name, count in counts.items()}
        tau = {name: own.steps for name, own in self.silos.items()}
        if self.train.proximal:  # FedNova, section 4: a = ((1 - ημ)^(τ-1), …, 1 - ημ, 1)
            shrinks = RATE * self.train.proximal
            tau = {name: (1 - (1 - shrinks) ** steps) / shrinks for name, steps in tau.items()}
        effective = sum(tau.values()) / len(tau)
        for name in trained:
            change = {silo: own.ends[name] - shared[name] for silo, own in self.silos.items()}
            if federation.normalized:
                mean = effective * sum(p[silo] * change[silo] / tau[silo] for silo in change)
            else:
                mean = sum(p[silo] * change[silo] for silo in change)
            if federation.control == "scaffold":
                deltas = []
                for silo, own in self.silos.items():
                    after = own.control[name] - self.c[name] - change[silo] / (own.steps * RATE)
                    deltas.append(after - own.control[name])
                    own.control[name] = after
                self.c[name] = self.c[name] + sum(deltas) / len(deltas)
            self.shared = self.shared | {name: self.shared[name] + mean}

    def round(self, number: int) -> None:
        trained = set(
            adapters.select_factors(self.shared, adapters.trained_factors(self.recipe.federation.lora, number))
        )
        self.local_round(trained)
        self.aggregate(trained)


def trained(recipe: Recipe, start: Tensors, trunk: set[str]) -> Oracle:
    oracle = Oracle(recipe, start, trunk)
    for number in range(1, ROUNDS + 1):
        oracle.round(number)
    return oracle


EQUAL = {"weights": {"kind": "equal"}}
SCAFFOLD = {"control": "scaffold", **EQUAL}
CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "plain, uneven": (UNEVEN, {}),
    "momentum": (EVEN, {"train": {"momentum": 0.8}}),
    "fedprox": (EVEN, {"train": {"proximal": PULL}}),
    "fedprox, uneven": (UNEVEN, {"train": {"proximal": PULL}}),
    "scaffold": (EVEN, {"federation": SCAFFOLD}),
    "scaffold, alternating": (EVEN, {"lora": "alternating", "federation": SCAFFOLD}),
    "fednova": (UNEVEN, {"federation": {"normalized": True}}),
    "fednova, equal weights": (UNEVEN, {"federation": {"normalized": True, **EQUAL}}),
    "fednova, fedprox": (UNEVEN, {"federation": {"normalized": True}, "train": {"proximal": PULL}}),
    "fednova, momentum": (UNEVEN, {"federation": {"normalized": True}, "train": {"momentum": 0.5}}),
    "sam": (EVEN, {"train": {"sharpness": DISTANCE}}),
    "sam, micro-batches": (EVEN, {"train": {"sharpness": DISTANCE, "micro_batches": 2}}),
    "sam, alternating": (EVEN, {"lora": "alternating", "train": {"sharpness": DISTANCE}}),
    "sam, fedprox, momentum, uneven": (UNEVEN, {"train": {"sharpness": DISTANCE, "proximal": PULL, "momentum": 0.5}}),
    "scaffold, fednova, sam": (
        UNEVEN,
        {"federation": {"normalized": True, **SCAFFOLD}, "train": {"sharpness": DISTANCE}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_federation_goes_as_the_papers_say(case: str, models: Models, tmp_path: Path) -> None:
    steps, sections = CASES[case]
    recipe = recipe_of(models("llama"), tmp_path, steps, **sections)
    run = RunDirectory.create(tmp_path / "run", recipe)
    trunk, ends = federate(recipe, run)
    start = run.role("trunk").load_round(0)["adapter"]
    start |= adapters.initial_tensors(Checkpoint(recipe.model.path).config, recipe)
    oracle = trained(recipe, start, set(trunk))
    assert_same(trunk | ends[0], oracle.trunk | oracle.shared, NEAR)

    told = {**sections, "train": {}, "federation": {}}
    plain = trained(recipe_of(models("llama"), tmp_path, EVEN, **told), start, set(trunk))
    assert max(distance(oracle.shared[name], tensor) for name, tensor in plain.shared.items()) > 100 * NEAR
    if recipe.federation.control == "scaffold":
        kept = run.role("root").load_round(ROUNDS)["control"]
        assert kept["counted"] == dict.fromkeys(SILOS, ROUNDS)
        assert_same(kept["mean"], {name: oracle.c[name] for name in kept["mean"]}, 1e-3)
