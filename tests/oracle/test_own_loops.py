"""Loops written by hand, odd ones too, and accelerate train the split model as the uncut one; two silos together train
as one model on the rows of both."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from isthmus.model import adapters
from isthmus.silo.join import join
from tests.conftest import make_recipe
from tests.oracle.conftest import BuildTwins, Models
from tests.oracle.twins import Twins, assert_same, freeze_a, load_lora, loopback, lora_of, padded, ragged

OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda them: torch.optim.SGD(them, lr=0.02, momentum=0.8),
    "adamw": lambda them: torch.optim.AdamW(them, lr=1e-3, weight_decay=0.1, eps=1e-4),
}
ACTS = ("backward", "backward", "step", "zero", "zero to zeros", "clip", "halve")


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def act(model: Any, optimizer: torch.optim.Optimizer, name: str, seed: int) -> float:
    """One act of a loop; returns what it computed."""
    if name == "backward":
        batch = ragged("right", seed=seed, lengths=(7, 7))
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        loss.backward()
        return float(loss.detach())
    if name == "step":
        optimizer.step()
    elif name == "clip":
        return float(torch.nn.utils.clip_grad_norm_(trained(model), 0.5))
    elif name == "halve":
        for parameter in trained(model):
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)
    else:
        optimizer.zero_grad(set_to_none=name == "zero")
    return 0.0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("adapter", ["shared", "replica"])
def test_random_loops(optimizer: str, seed: int, adapter: str, twins_of: BuildTwins) -> None:
    """Gradients that are accumulated, dropped, clipped, scaled, stepped twice or never."""
    twins = twins_of("llama", (2, 1), ends_train_a=adapter == "shared", sections={"trunk": {"adapter": adapter}})
    if adapter == "replica":  # A is frozen
        freeze_a(twins.whole, lora_of(twins.whole))
    sides = [(model, OPTIMIZERS[optimizer](trained(model))) for model in twins.both]
    draw = random.Random(seed)
    acts = ["backward", "step", *(draw.choice(ACTS) for _ in range(25)), "backward", "step"]
    for number, name in enumerate(acts):
        split, whole = (act(model, own, name, number) for model, own in sides)
        assert split == pytest.approx(whole, rel=2e-5, abs=1e-7), acts[: number + 1]
    expected = {name: tensor.detach() for name, tensor in lora_of(twins.whole).items()}
    assert_same(twins.split_adapter(), expected, 1e-4)


@pytest.fixture
def twins(twins_of: BuildTwins) -> Twins:
    return twins_of("llama", (2, 1))


def accelerated(model: Any, folder: Path, *, steps: int = 4) -> list[float]:
    """Losses of a loop with accelerate that accumulates, clips, saves in the middle, trains on and returns there."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    rows = [(list(range(5 + row, 15 + row)), list(range(5 + row, 15 + row))) for row in range(4 * steps)]
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    loader = DataLoader(rows, batch_size=2, collate_fn=lambda batch: padded(batch, "right"))  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []

    def train() -> None:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))

    train()
    accelerator.save_state(str(folder))
    train()
    accelerator.load_state(str(folder))
    train()
    return losses


@pytest.mark.filterwarnings("ignore")
def test_accelerate_trains_saves_and_returns(twins: Twins, tmp_path: Path) -> None:
    split, whole = (accelerated(model, tmp_path / name) for model, name in zip(twins.both, "sw", strict=True))
    assert split == pytest.approx(whole, rel=1e-5)
    third = len(split) // 3
    assert split[third : 2 * third] == pytest.approx(split[2 * third :], rel=1e-5)
    assert split[0] != pytest.approx(split[third], rel=1e-3)


def test_a_state_kept_in_memory_brings_back_all_parts(twins: Twins) -> None:
    optimizer = OPTIMIZERS["sgd"](trained(twins.split))
    for number in range(2):
        act(twins.split, optimizer, "backward", number)
        act(twins.split, optimizer, "step", number)
        if not number:
            kept, before = copy.deepcopy(twins.split.state_dict()), twins.split_adapter()
    assert any(not torch.equal(before[name], tensor) for name, tensor in twins.split_adapter().items())
    twins.split.load_state_dict(kept)
    assert_same(twins.split_adapter(), before, 0.0)


def test_two_silos_together_are_one_model_on_the_rows_of_both(
    twins_of: BuildTwins, models: Models, tmp_path: Path
) -> None:
    """The trunk's adapter gets the mean by supervised tokens; each silo's ends are its own, and stay as they are."""
    twins = twins_of("llama", (2, 1), sections={"silos": ("a", "b")})
    recipe = make_recipe(models("llama"), silos=("a", "b"), model={"bottom": 2, "top": 1})
    other = join(recipe, "b", channel=loopback(twins.service, "b", recipe), participants=["a", "b"])
    twins.remote.rounds.participants = ["a", "b"]
    for here, there in zip(other.model.ends, twins.split.ends, strict=True):
        adapters.load_adapter(here, adapters.adapter_of(there))
    load_lora(twins.whole, twins.split_adapter())
    for model in (other.model, *twins.both):
        for name, parameter in model.named_parameters():
            inner = ".layers.2." in name or ".layers.3." in name or "stand_in" in name
            parameter.requires_grad_("lora" in name and (inner if model is twins.whole else "stand_in" in name))
    rows = [ragged("right", seed=seed, lengths=(5 + 6 * seed,)) for seed in (0, 1)]
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in rows]

    def silo_steps(model: Any, batch: dict[str, torch.Tensor]) -> None:
        optimizer = OPTIMIZERS["sgd"](trained(model))
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        model.state_dict()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(silo_steps, *one) for one in zip((twins.split, other.model), rows, strict=True)]:
            done.result()
    optimizer = OPTIMIZERS["sgd"](trained(twins.whole))
    for _ in range(3):
        optimizer.zero_grad()
        for batch, count in zip(rows, tokens, strict=True):
            (twins.whole(**batch).loss * count / sum(tokens)).backward()
        optimizer.step()
    expected = {name: tensor.detach() for name, tensor in lora_of(twins.whole).items()}
    assert_same(twins.split_adapter(), expected, 1e-4)
    assert twins.service._training._store.last_round() == 1
