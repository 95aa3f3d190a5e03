"""A 16-bit base: what 80 steps never move, and the loss, beside the uncut model by peft. ``make bench-numbers``.

The split model trains all parts of its adapter, A and B, over loopback, and the uncut one the same tensors by plain
peft, on the same batches. ``ISTHMUS_MODELS`` and ``ISTHMUS_DATA`` name the folders of stories260k and of Shakespeare.
In fp16 a processor needs half a minute for a step of SmolLM2, so there it is left out.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.common.results import DEVICE, Results
from benchmarks.common.rows import SHARED
from isthmus.data.tokens import Batch, Tokens, collate
from isthmus.demo.assets import smollm2
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.optim import build_optimizer
from isthmus.recipe import Recipe
from isthmus.silo.join import greeting, join, load_tokenizer
from isthmus.silo.trainer import train_step
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import LoopbackChannel

MODELS = Path(os.environ.get("ISTHMUS_MODELS", "../shared/models"))
STEPS, RATE, ROWS, LENGTH, LAST = 80, 1e-4, 2, 48, 10
PEFT = "base_model.model."
Tensors = dict[str, torch.Tensor]


def main() -> None:
    results = Results("numbers", "make bench-numbers", torch.device(DEVICE))
    measure(results, "stories260k", MODELS / "stories260k", ("bfloat16", "float16"))
    dtypes = ("bfloat16",) if DEVICE == "cpu" else ("bfloat16", "float16")
    measure(results, "SmolLM2-135M", smollm2(Path("build/demo")), dtypes)
    print(f"written: {results.write()}")


def measure(results: Results, name: str, folder: Path, dtypes: tuple[str, ...]) -> None:
    """One model: in fp32 by peft, then with each base in 16 bits, split, by peft, and with peft's casts off."""
    wide, _ = by_peft(recipe_of(folder, "float32"))
    results.add(f"{name}, float32 base, peft: loss", wide, "nats")
    for dtype in dtypes:
        recipe = recipe_of(folder, dtype)
        theirs, their_still = by_peft(recipe)
        ours, our_still = by_split(recipe)
        narrow, narrow_still = by_peft(recipe, autocast=False)
        label = f"{name}, {dtype} base"
        results.add(f"{label}, peft: loss", theirs, "nats")
        results.add(f"{label}, split: loss", ours, "nats")
        results.add(f"{label}, split against peft: loss", abs(ours / theirs - 1), "share", at_most=0.01)
        results.add(f"{label}, peft: numbers that never moved", their_still, "share")
        results.add(f"{label}, split: numbers that never moved", our_still, "share", at_most=their_still + 1e-4)
        results.add(f"{label}, 16-bit adapters in the uncut model: loss", narrow, "nats")
        results.add(f"{label}, 16-bit adapters in the uncut model: never moved", narrow_still, "share")


def recipe_of(folder: Path, dtype: str) -> Recipe:
    return Recipe.of(
        {
            "model": {"path": str(folder), "dtype": dtype, "bottom": 1, "top": 1},
            "boundary": {path: {"noise": 0.0} for path in ("forward", "gradient", "update")},
            "train": {"evaluate": False, "steps": STEPS, "learning_rate": RATE},
            "federation": {"lora": "plain"},
            "trunk": {"device": DEVICE},
            "silo": [{"name": "a", "train": "a.jsonl", "device": DEVICE}],
        }
    )


def batches_of(recipe: Recipe) -> Iterator[Batch]:
    """The steps' batches: rows of Shakespeare, one after another."""
    tokenizer = load_tokenizer(Path(recipe.model.path))
    text = next((SHARED / "tinyshakespeare").glob("*.txt")).read_text(encoding="utf-8")[:200_000]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]
    for step in range(STEPS):
        chosen = [rows[(step * ROWS + number) % len(rows)] for number in range(ROWS)]
        yield collate([Tokens(row[:1], row[1:]) for row in chosen], tokenizer.pad_token_id or 0).to(
            torch.device(DEVICE)
        )


def by_split(recipe: Recipe) -> tuple[float, float]:
    """The split model's last loss, and the share of its adapter's numbers that no step moved."""
    with tempfile.TemporaryDirectory() as folder:
        service = TrunkService(recipe, RoleDirectory(Path(folder)))
        hello = greeting(Checkpoint(recipe.model.path), recipe)
        silo = join(recipe, "a", channel=LoopbackChannel(service, "a", greeting=hello))
        parts = (*silo.parts, service._runner.part)
        start = {name: one for part in parts for name, one in adapters.adapter_of(part).items()}
        optimizer = build_optimizer([one for one in silo.model.parameters() if one.requires_grad], recipe.train)
        silo.rounds.begin(1, ["a"])
        losses = []
        for number, batch in enumerate(batches_of(recipe), 1):
            step = train_step(silo.model, optimizer, batch)
            silo.rounds.commit(1, number, step.weight)
            losses.append(step.loss or 0.0)
        end = {name: one for part in parts for name, one in adapters.adapter_of(part).items()}
        silo.close()
        service.stop()
    return statistics.fmean(losses[-LAST:]), still(start, end)


def by_peft(recipe: Recipe, *, autocast: bool = True) -> tuple[float, float]:
    """The uncut model's, from the same first values.

    Args:
        autocast: peft's own, which keeps adapters in fp32.
    """
    dtype = getattr(torch, recipe.model.dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=dtype)
    lora = recipe.lora
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    whole = get_peft_model(model, config, autocast_adapter_dtype=autocast).eval()
    trained = {
        name.removeprefix(PEFT).replace(".default", ""): one
        for name, one in whole.named_parameters()
        if one.requires_grad
    }
    first = starting_values(recipe)
    with torch.no_grad():
        for name, one in trained.items():
            one.data = first[name].to(one.dtype if autocast else dtype)
    whole.to(DEVICE)
    start = {name: one.detach().clone() for name, one in trained.items()}
    optimizer, losses = build_optimizer(trained.values(), recipe.train), []
    for batch in batches_of(recipe):
        losses.append(train_step(whole, optimizer, batch).loss or 0.0)
    return statistics.fmean(losses[-LAST:]), still(start, {name: one.detach() for name, one in trained.items()})


def starting_values(recipe: Recipe) -> Tensors:
    """The first values of all parts' adapters."""
    with tempfile.TemporaryDirectory() as folder:
        service = TrunkService(recipe, RoleDirectory(Path(folder)))
        trunk = adapters.adapter_of(service._runner.part)
        service.stop()
    return trunk | adapters.initial_tensors(Checkpoint(recipe.model.path).config, recipe)


def still(start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor]) -> float:
    """The share of numbers that are what they were at the start."""
    same = sum(int((start[name] == end[name].to(start[name])).sum()) for name in start)
    return same / sum(one.numel() for one in start.values())


if __name__ == "__main__":
    main()
