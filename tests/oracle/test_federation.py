"""Four silos and one local SGD step a round are one uncut model trained on all their rows at once."""

from __future__ import annotations

import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Batch, collate
from isthmus.engines.export import final_adapter
from isthmus.errors import MismatchError
from isthmus.federation.aggregator import root_service
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import Recipe
from isthmus.silo.join import load_tokenizer
from isthmus.silo.worker import Worker
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import make_recipe, targets_of, uncut, write_rows
from tests.oracle.conftest import Models
from tests.oracle.twins import Tensors, assert_same, load_lora, loopback, lora_of, with_lora

SILOS = {
    "north": ((7, 1), (3, 4), (12, 2)),
    "east": ((2, 1), (20, 5), (3, 3)),
    "south": ((5, 3), (9, 1), (1, 1)),
    "west": ((4, 2), (6, 6), (8, 1)),
}
"""Tokens of prompt and answer of every row; as many rows each, so that one batch is all of them."""
ROUNDS = 3
RATE = 0.005
WAIT = 120.0
RESTING = {"frozen-a": ("lora_A",) * ROUNDS, "alternating": ("lora_A", "lora_B", "lora_A"), "plain": ("none",) * ROUNDS}
"""By round, what stands still in bottom and top."""


def write_silos(folder: Path) -> list[dict[str, str]]:
    """A file of random words for each silo; returns their sections of the recipe."""
    draw = random.Random(5)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(4, 97)}" for _ in range(count))

    sections = []
    for name, rows in SILOS.items():
        file = write_rows(folder / f"{name}.jsonl", [{"text": words(p), "reply": words(a)} for p, a in rows])
        sections.append({"name": name, "train": str(file)})
    return sections


def federation_of(
    model: Path, folder: Path, family: str = "llama", *, adapter: str = "shared", lora: str = "frozen-a"
) -> Recipe:
    return make_recipe(
        model,
        trunk={"adapter": adapter},
        federation={"lora": lora},
        silo=write_silos(folder),
        lora={"targets": targets_of(family)},
        model={"bottom": 1, "top": 2},
        task={"prompt": "{text}", "answer": " {reply}"},
        train={
            "rounds": ROUNDS,
            "steps": 1,
            "batch": 3,
            "optimizer": "sgd",
            "learning_rate": RATE,
            "evaluate": False,
        },
    )


def federate(recipe: Recipe, run: RunDirectory) -> tuple[Tensors, list[Tensors]]:
    """Train, on from what the run has reached, with a worker a thread; returns the trunk's adapter and each silo's."""
    trunk = TrunkService(recipe, run.role("trunk"))
    trunk.restore(run.completed())
    root = root_service(recipe, run.role("root"), trunk=trunk)

    def silo(name: str) -> Tensors:
        ways = {"trunk": loopback(trunk, name, recipe), "root": LoopbackChannel(root, name)}
        worker = Worker(recipe, name, run.role(name), **ways)
        worker.run()
        worker.close()
        return {key: value for part in worker._silo.parts for key, value in adapters.adapter_of(part).items()}

    with ThreadPoolExecutor(len(SILOS)) as threads:
        ends = list(threads.map(silo, SILOS, timeout=WAIT))
    trunk.stop()
    return adapters.adapter_of(trunk._runner.part), ends


def batch_of_all(recipe: Recipe) -> Batch:
    tokenizer = load_tokenizer(Path(recipe.model.path))
    silos = [SiloData(section, recipe, tokenizer) for section in recipe.silo]
    return collate([row for silo in silos for row in silo.train], silos[0].pad)


def train_uncut(recipe: Recipe, start: Tensors, resting: list[set[str]]) -> PeftModel:
    """The recipe's optimizer on the mean over all silos' supervised tokens, but for what rests in a round.

    Ends and trunk have an optimizer each, as they clip the norm of their own gradients.
    """
    train, whole = recipe.train, with_lora(uncut(Path(recipe.model.path)), recipe)
    load_lora(whole, start)
    middle = [one for name, one in lora_of(whole).items() if re.search(r"\.layers\.[12]\.", name)]
    others = [one for name, one in lora_of(whole).items() if not re.search(r"\.layers\.[12]\.", name)]
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[train.optimizer]
    optimizers = [kind(part, lr=RATE, weight_decay=train.weight_decay) for part in (middle, others)]
    inputs: dict[str, Any] = batch_of_all(recipe).inputs()
    for done, names in enumerate(resting):
        for name, parameter in lora_of(whole).items():
            parameter.requires_grad_(name not in names)
        whole.zero_grad()
        whole(**inputs).loss.backward()
        for part, optimizer in zip((middle, others), optimizers, strict=True):
            if train.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(part, train.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - done / ROUNDS if train.schedule == "linear" else 1)
            optimizer.step()
    return whole


CASES = [
    ("llama", "shared", "frozen-a"),
    ("gemma2", "shared", "frozen-a"),
    ("llama", "replica", "frozen-a"),
    ("llama", "shared", "alternating"),
    ("llama", "replica", "alternating"),
    ("llama", "shared", "plain"),
]


@pytest.mark.parametrize(("family", "adapter", "lora"), CASES)
def test_federation_is_training_on_all_rows(
    family: str, adapter: str, lora: str, models: Models, tmp_path: Path
) -> None:
    """With a replica a silo, too: the mean of their single steps of SGD is a step by the mean gradient."""
    recipe = federation_of(models(family), tmp_path, family, adapter=adapter, lora=lora)
    run = RunDirectory.create(tmp_path / "run", recipe)
    trunk, ends = federate(recipe, run)
    first, *others = ends
    assert all(torch.equal(other[name], tensor) for other in others for name, tensor in first.items())

    start = run.role("trunk").load_round(0)["adapter"]
    start |= adapters.initial_tensors(Checkpoint(recipe.model.path).config, recipe)
    replicated = {name for name in trunk if adapter == "replica" and "lora_A" in name}
    resting = [replicated | {name for name in first if kind in name} for kind in RESTING[lora]]
    whole = {name: value.detach() for name, value in lora_of(train_uncut(recipe, start, resting)).items()}
    assert_same(trunk | first, whole, 1e-5)
    moved = {name for name, value in whole.items() if not torch.equal(value, start[name])}
    assert moved == whole.keys() - set.intersection(*resting)
    number, kept = final_adapter(run)
    assert number == ROUNDS
    assert_same(kept, trunk | first, 0.0)

    shared = {name: tensor for name, tensor in first.items() if "lora_B" in name or lora != "frozen-a"}
    assert_same(run.role("root").load_round(ROUNDS)["shared"], shared, 0.0)
    weights = {name: float(sum(answer + 1 for _, answer in rows)) for name, rows in SILOS.items()}
    for line in read_journal(run.role("root").path / "metrics.jsonl"):
        assert line["weights"] == weights


ADAMW = {"optimizer": "adamw", "schedule": "linear", "weight_decay": 0.1, "max_grad_norm": 0.05}


@pytest.mark.parametrize("lora", ["frozen-a", "alternating", "plain"])
def test_gradients_are_one_optimizer_on_all_rows(lora: str, models: Models, tmp_path: Path) -> None:
    """Of silos' gradients the mean is the gradient of all rows: Adam, decay, clip and schedule are as without silos."""
    plain = federation_of(models("llama"), tmp_path, lora=lora)
    recipe = plain.model_copy(
        update={
            "train": plain.train.model_copy(update=ADAMW),
            "federation": plain.federation.model_copy(update={"updates": "gradients"}),
        }
    )
    run = RunDirectory.create(tmp_path / "run", recipe)
    trunk, ends = federate(recipe, run)
    assert all(torch.equal(other[name], tensor) for other in ends[1:] for name, tensor in ends[0].items())
    start = run.role("trunk").load_round(0)["adapter"]
    start |= adapters.initial_tensors(Checkpoint(recipe.model.path).config, recipe)
    resting = [{name for name in ends[0] if kind in name} for kind in RESTING[lora]]
    whole = {name: value.detach() for name, value in lora_of(train_uncut(recipe, start, resting)).items()}
    assert_same(trunk | ends[0], whole, 1e-3)  # Adam divides by tiny gradients, and so enlarges rounding
    shared = run.role("root").load_round(ROUNDS)["shared"]
    moved = {name for name, value in shared.items() if not torch.equal(value, start[name])}
    assert moved == shared.keys()


def test_gradients_go_on_where_they_were_stopped(models: Models, tmp_path: Path) -> None:
    """The root's moments are part of its rounds: all roles start anew before each, and nothing differs."""
    plain = federation_of(models("llama"), tmp_path, lora="alternating")
    gradients = plain.federation.model_copy(update={"updates": "gradients"})
    alone = plain.trunk.model_copy(update={"together": 1})

    def rounds(count: int) -> Recipe:
        train = plain.train.model_copy(update=ADAMW | {"schedule": "constant", "rounds": count})
        return plain.model_copy(update={"train": train, "federation": gradients, "trunk": alone})

    undisturbed = federate(rounds(4), RunDirectory.create(tmp_path / "undisturbed", plain))
    run = RunDirectory.create(tmp_path / "stopped", plain)
    trunk, ends = [federate(rounds(count), run) for count in (1, 2, 3, 4)][-1]
    assert_same(trunk, undisturbed[0], 0.0)
    assert_same(ends[0], undisturbed[1][0], 0.0)


@pytest.mark.parametrize(("began", "goes_on"), [("gradients", "changes"), ("changes", "gradients")])
def test_a_run_that_changes_its_updates_goes_on_or_says_why_not(
    began: str, goes_on: str, models: Models, tmp_path: Path
) -> None:
    """A silo that never stepped has no moments to step with."""
    plain = federation_of(models("llama"), tmp_path)

    def rounds(count: int, updates: str) -> Recipe:
        train = plain.train.model_copy(update={"rounds": count, "optimizer": "adamw"})
        federation = plain.federation.model_copy(update={"updates": updates})
        return plain.model_copy(update={"train": train, "federation": federation})

    run = RunDirectory.create(tmp_path / "run", plain)
    federate(rounds(1, began), run)
    if goes_on == "gradients":
        federate(rounds(2, goes_on), run)
        return
    with pytest.raises(MismatchError, match="another optimizer than AdamW"):
        federate(rounds(2, goes_on), run)


@pytest.mark.parametrize("lora", ["alternating", "svd"])
def test_rounds_go_on_where_they_were_stopped(lora: str, models: Models, tmp_path: Path) -> None:
    """All roles start anew before each round, with several steps of Adam in it: the same adapters to the last bit."""
    recipe = federation_of(models("llama"), tmp_path, lora=lora)
    if lora == "svd":
        silos = [one.model_copy(update={"rank": rank}) for one, rank in zip(recipe.silo, (2, 4, 8, None), strict=True)]
        recipe = recipe.model_copy(update={"silo": tuple(silos)})
    alone = recipe.trunk.model_copy(update={"together": 1})  # what shares a pass changes last bits

    def rounds(count: int) -> Recipe:
        train = recipe.train.model_copy(update={"rounds": count, "steps": 2, "optimizer": "adamw"})
        return recipe.model_copy(update={"train": train, "trunk": alone})

    undisturbed = federate(rounds(4), RunDirectory.create(tmp_path / "undisturbed", recipe))
    run = RunDirectory.create(tmp_path / "stopped", recipe)
    trunk, ends = [federate(rounds(count), run) for count in (1, 2, 3, 4)][-1]
    assert_same(trunk, undisturbed[0], 0.0)
    for own, expected in zip(ends, undisturbed[1], strict=True):
        assert_same(own, expected, 0.0)
    releases = read_ledger(run.role("north").path / "ledger.jsonl").releases()
    sizes = [one.width for one in releases if one.path == "update"]
    both = sum(tensor.numel() for tensor in ends[0].values())
    assert sizes == [both] * 4 if lora == "svd" else (sizes[:2] == sizes[2:] and sum(sizes[:2]) == both)
    _, whole = final_adapter(run)
    assert {tensor.shape[0] for name, tensor in whole.items() if "lora_A" in name} == {recipe.lora.rank}
