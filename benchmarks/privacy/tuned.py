"""One uncut model, tuned on a task's pooled rows, its adapter folded into the weights: any cut of it is a split model.

``python -m benchmarks.privacy.tuned TASK ...``; what is in ``build/frontier`` is not tuned again.
"""

from __future__ import annotations

import os
import sys
from itertools import islice
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.common.results import DEVICE
from benchmarks.privacy.tasks import CACHE, LORA, TASKS, Task
from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import batches, collate
from isthmus.demo.assets import smollm2
from isthmus.model import adapters
from isthmus.model.cut import Part
from isthmus.model.device import find_device
from isthmus.model.families import family_of
from isthmus.model.optim import build_optimizer
from isthmus.recipe import Recipe
from isthmus.silo.join import load_tokenizer
from isthmus.silo.trainer import train_step


def main() -> None:
    for name in sys.argv[1:] or TASKS:
        print(tuned(TASKS[name], smollm2(Path("build/demo")).resolve()))


def tuned(task: Task, base: Path) -> Path:
    """The folder of the base model tuned on this task's training rows, made if it is not there."""
    folder = CACHE / task.name
    if not folder.exists():
        partial = folder.with_name(f"{task.name}-{os.getpid()}.partial")
        model = _trained(task.recipe(base, lora=LORA))
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        whole.load_state_dict(_folded(model))
        whole.save_pretrained(partial)
        load_tokenizer(base).save_pretrained(partial)
        partial.rename(folder)
    return folder


def _trained(recipe: Recipe) -> PreTrainedModel:
    """LoRA on every block, by the rows of the silo that gives training rows."""
    folder = Path(recipe.model.path)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(find_device(DEVICE))
    whole = Part("trunk", model.requires_grad_(False), family_of(model.config), 0)
    adapters.add_adapter(whole, recipe.lora, recipe.seed, freeze_a=False)
    optimizer = build_optimizer(adapters.trainable(whole).values(), recipe.train)
    data = SiloData(recipe.party("west"), recipe, load_tokenizer(folder))
    drawn = islice(batches(data.train, recipe.train.batch, "tuned"), recipe.train.steps)
    for number, rows in enumerate(drawn, 1):
        step = train_step(model, optimizer, collate(rows, data.pad).to(model.device))
        if number % 10 == 0:
            print(f"tuning: step {number}/{recipe.train.steps}, loss {step.loss:.3f}, {step.seconds:.1f} s", flush=True)
    return model.eval()


def _folded(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights by their uncut names, each with its adapter's product added."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    weights = model.state_dict().items()
    return {name.replace(".base_layer", ""): tensor for name, tensor in weights if "lora_" not in name}


if __name__ == "__main__":
    main()
