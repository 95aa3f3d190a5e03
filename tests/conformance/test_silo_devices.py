"""Silos and attacks on an accelerator: where there is one, they compute what the CPU does.

Noise and random rounding are drawn afresh every time, so nothing is noised here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.audit.attack import AttackPlan, AttackResult, run_attacks
from isthmus.audit.target import Target
from isthmus.federation.aggregator import root_service
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.drafting.distil import distil
from isthmus.silo.join import greeting, join, load_data
from isthmus.silo.trainer import evaluate
from isthmus.silo.worker import Worker
from isthmus.storage.record import RoleDirectory, RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import make_recipe, write_rows
from tests.oracle.twins import assert_same, save_vivid_model
from tests.unit.attacks.attacked import random_rows, say

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ("cpu", "cuda")
CLOSE = 1e-3
CLASSES = ["w40", "w71"]
BOUNDARIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rounded": {"codec": {"forward_up": "int8", "forward_down": "int8"}},
    "narrow": {"width": 8, "residual": True, "gradients": False, "tail": 2},
    "guarded": {
        "width": 8,
        "residual": True,
        "gradients": False,
        "defence": {"answer": 1.0, "inverter": 0.5, "capacity": 0.1, "correlation": 1.0},
        "forward": {"clip": 1.0, "noise": 1e-6},
    },
    "denoised": {"denoise": True, "forward": {"noise": 1e-6}},
}
ADVERSARIES = {
    "trunk+silo": ("linear", "matching", "transformer", "decoder", "search", "identify", "lens", "published"),
    "aggregator": ("dager",),
    "outsider": ("membership",),
}


def recipe_on(device: str, folder: Path, boundary: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """Two silos and their trunk on this device."""
    model = folder / "model"
    if not model.exists():
        save_vivid_model("llama", model)
    silos = []
    for seed, name in enumerate("ab"):
        rows = [{"prompt": say(row.prompt) + " w5", "answer": CLASSES[seed]} for row in random_rows(30, seed, 8)]
        files = {part: str(write_rows(folder / f"{name}-{part}.jsonl", rows)) for part in ("train", "held_out")}
        silos.append({"name": name, "device": device, **files})
    still = {path: {"noise": 0.0} for path in ("forward", "gradient", "update")}
    settings: dict[str, Any] = {
        "train": {"steps": 3, "rounds": 1, "batch": 4, "learning_rate": 1e-3},
        "root": {"minimum": 1, "patience": 0.2},
        "trunk": {"device": device},
        **sections,
    }
    return make_recipe(model, silo=silos, boundary={**still, **(boundary or {})}, **settings)


def finished(recipe: Recipe, path: Path) -> RunDirectory:
    """The run in which silo ``a`` alone has trained a round."""
    run = RunDirectory.create(path, recipe)
    trunk, root = TrunkService(recipe, run.role("trunk")), root_service(recipe, run.role("root"))
    hello = greeting(Checkpoint(recipe.model.path), recipe)
    channels = LoopbackChannel(trunk, "a", greeting=hello), LoopbackChannel(root, "a")
    Worker(recipe, "a", run.role("a"), trunk=channels[0], root=channels[1]).run()
    trunk.stop()
    return run


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", BOUNDARIES)
def test_a_round_on_a_device_is_the_cpus(name: str, micro_batches: int, tmp_path: Path) -> None:
    train: dict[str, Any] = {"steps": 3, "rounds": 1, "batch": 4, "micro_batches": micro_batches}
    train |= {"optimizer": "sgd", "learning_rate": 0.1}  # AdamW makes whole steps of gradients that are rounding errors
    there, here = (
        finished(recipe_on(device, tmp_path, BOUNDARIES[name], train=train), tmp_path / f"run{number}")
        .role("root")
        .load_round(1)["shared"]
        for number, device in enumerate(reversed(DEVICES))
    )
    assert {one.device.type for one in there.values()} == {"cpu"}
    if name in ("plain", "narrow"):
        assert_same(there, here, CLOSE)


@pytest.mark.parametrize("choices", [CLASSES, []], ids=["choices", "free text"])
def test_measuring_and_answering_on_a_device(choices: list[str], tmp_path: Path) -> None:
    scores, answers = [], []
    for device in DEVICES:
        recipe = recipe_on(device, tmp_path, task={"choices": choices})
        service = TrunkService(recipe, RoleDirectory(tmp_path / device))
        hello = greeting(Checkpoint(recipe.model.path), recipe)
        silo = join(recipe, "a", channel=LoopbackChannel(service, "a", greeting=hello))
        data = load_data(recipe, "a", silo)
        scores.append(evaluate(silo.model, data))
        draft, _ = distil(silo, data.train[:6], longest=6, tell=lambda told: None)
        ids_BL = torch.tensor([data.train[0].prompt], device=silo.model.device)
        for assistant in (None, draft):
            answer = silo.model.generate(ids_BL, max_new_tokens=8, do_sample=False, assistant_model=assistant)
            answers.append(answer.tolist())
        service.stop()
    for name, score in scores[0].items():
        assert scores[1][name] == pytest.approx(score, rel=CLOSE)
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize(
    ("adversary", "name"), [(adversary, name) for adversary, names in ADVERSARIES.items() for name in names]
)
def test_an_attack_on_a_device_finds_what_it_finds_on_the_cpu(adversary: str, name: str, tmp_path: Path) -> None:
    boundary = {"tail": 2, "residual": True} if name in ("search", "decoder") else {}
    found: list[list[AttackResult]] = []
    for device in DEVICES:
        recipe = recipe_on(device, tmp_path, boundary, task={"choices": CLASSES})
        run = finished(recipe, tmp_path / f"run-{len(found)}") if adversary == "outsider" else None
        source = Target(recipe, run)
        order = AttackPlan((adversary,), (name,), "a", "b", rows=6, own_rows=30, references=2, device=device)
        found.append(run_attacks(source, order, lambda told: None))
    for here, there in zip(*found, strict=True):
        assert set(here.figures) == set(there.figures)
        if name in ("linear", "matching", "identify", "lens"):
            for figure, value in here.figures.items():
                assert there.figures[figure].value == pytest.approx(value.value, abs=0.05)
