"""Each key of training, over rounds of a silo, a trunk and a root, against the uncut model by plain peft, torch's
optimizers and transformers' schedules."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import get_scheduler

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Batch, batches, collate
from isthmus.engines.export import export_adapter
from isthmus.federation.aggregator import root_service
from isthmus.model import adapters
from isthmus.recipe import Recipe
from isthmus.report.progress import read_progress
from isthmus.silo.join import join, load_tokenizer
from isthmus.silo.trainer import train_step
from isthmus.silo.worker import Worker
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from isthmus.trunk.grouped_lora import dropout_mask
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import make_recipe, uncut, write_rows
from tests.oracle.conftest import BuildTwins, Models
from tests.oracle.test_training import batches as even_batches
from tests.oracle.twins import Tensors, assert_same, distance, load_lora, loopback, lora_of, ragged, with_lora

ROUNDS, STEPS, RATE = 2, 3, 1e-2
KEYS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "linear": {"train": {"schedule": "linear"}},
    "cosine, a share of warm-up": {"train": {"schedule": "cosine", "warmup": 0.3}},
    "warm-up alone": {"train": {"warmup": 4}},
    "weight decay": {"train": {"weight_decay": 0.5}},
    "clipped": {"train": {"max_grad_norm": 0.05}},
    "sgd": {
        "train": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.5, "schedule": "cosine", "max_grad_norm": 0.5}
    },
    "rslora": {"lora": {"rslora": True}},
    "all linear": {"lora": {"targets": "all-linear"}},
    "all linear, 16 bits": {"lora": {"targets": "all-linear", "rslora": True}, "model": {"dtype": "bfloat16"}},
    "epochs": {"train": {"epochs": 3, "schedule": "linear", "warmup": 2, "batch": 3}},
    "replica": {
        "train": {"schedule": "linear", "warmup": 2, "weight_decay": 0.5, "max_grad_norm": 0.05},
        "trunk": {"adapter": "replica"},
    },
    "dropout": {"lora": {"dropout": 0.5}, "train": {"schedule": "linear"}},
}


def recipe_of(models: Models, folder: Path, sections: dict[str, Any]) -> Recipe:
    train = sections.get("train", {})
    rows = [{"text": f"w{4 + 3 * n} w{9 + 2 * n} w{60 - n}", "reply": f"w{30 + n} w{12 + n}"} for n in range(8)]
    return make_recipe(
        models("llama"),
        model={"bottom": 2, "top": 1, **sections.get("model", {})},
        lora={"rank": 4, **sections.get("lora", {})},
        federation={"lora": "plain"},
        silo=[{"name": "a", "train": str(write_rows(folder / "a.jsonl", rows))}],
        task={"prompt": "{text}", "answer": " {reply}"},
        train={"rounds": ROUNDS, "batch": 2, "learning_rate": RATE, "evaluate": False}
        | ({} if "epochs" in train else {"steps": STEPS})
        | train,
        trunk=sections.get("trunk", {}),
    )


def federate(recipe: Recipe, run: RunDirectory) -> Tensors:
    """Train, on from what the run has reached; returns the adapter of all parts."""
    trunk = TrunkService(recipe, run.role("trunk"))
    trunk.restore(run.completed())
    root = root_service(recipe, run.role("root"))

    def train(name: str) -> Worker:
        ways = {"trunk": loopback(trunk, name, recipe), "root": LoopbackChannel(root, name)}
        worker = Worker(recipe, name, run.role(name), **ways)
        worker.run()
        worker.close()
        return worker

    names = [silo.name for silo in recipe.silo]
    with ThreadPoolExecutor(len(names)) as threads:
        worker, *_ = threads.map(train, names, timeout=60)
    trunk.stop()
    parts = (*worker._silo.parts, trunk._runner.part)
    return {name: tensor for part in parts for name, tensor in adapters.adapter_of(part).items()}


def steps_of(recipe: Recipe) -> list[Batch]:
    """The batches of all steps; with epochs three passes over eight rows in batches of at most three."""
    data = SiloData(recipe.silo[0], recipe, load_tokenizer(Path(recipe.model.path)))
    if recipe.train.epochs is None:
        drawn = list(islice(batches(data.train, recipe.train.batch, f"{recipe.seed}/a"), ROUNDS * STEPS))
    else:
        order = random.Random(f"{recipe.seed}/a")
        passes = [order.sample(data.train, len(data.train)) for _ in range(recipe.train.epochs)]
        drawn = [rows for one in passes for rows in (one[:3], one[3:6], one[6:])]
    return [collate(rows, data.pad) for rows in drawn]


def train_uncut(recipe: Recipe, start: Tensors) -> tuple[PeftModel, list[float]]:
    """The uncut model, with the losses of its steps; A of a replica is frozen in the trunk, here as there."""
    train = recipe.train
    whole = with_lora(uncut(Path(recipe.model.path), getattr(torch, recipe.model.dtype)), recipe)
    load_lora(whole, start)
    named = {name: one for name, one in lora_of(whole).items() if name in start}
    trunk = {name for name in named if 2 <= int(name.split(".")[2]) < 4}
    if recipe.trunk.adapter == "replica":
        for name in trunk:
            named[name].requires_grad_("lora_A" not in name)
    ends, middle = ([one for name, one in named.items() if (name in trunk) == inside] for inside in (False, True))
    if train.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(
            named.values(), lr=RATE, momentum=train.momentum, weight_decay=train.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(named.values(), lr=RATE, weight_decay=train.weight_decay)
    steps = steps_of(recipe)
    total = len(steps)
    warm = train.warmup if train.warmup >= 1 else -(-total * train.warmup // 1)
    name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    schedule = get_scheduler(name, optimizer, num_warmup_steps=int(warm), num_training_steps=total)
    losses = []
    for batch in steps:
        optimizer.zero_grad()
        loss = whole(**batch.inputs()).loss
        loss.backward()
        for party in (ends, middle):  # each clips what it steps
            if train.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(party, train.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return whole, losses


@pytest.mark.parametrize("key", [key for key in KEYS if key != "dropout"])
def test_a_key_does_what_it_does_to_the_uncut_model(key: str, models: Models, tmp_path: Path) -> None:
    recipe = recipe_of(models, tmp_path, KEYS[key])
    run = RunDirectory.create(tmp_path / "run", recipe)
    trained = federate(recipe, run)
    config = uncut(Path(recipe.model.path)).config
    start = run.role("trunk").load_round(0)["adapter"] | adapters.initial_tensors(config, recipe)
    whole, losses = train_uncut(recipe, start)
    lines = [line for line in read_journal(run.role("a").path / "metrics.jsonl") if line["event"] == "step"]
    tolerance = 2e-3 if recipe.model.dtype == "bfloat16" else 1e-5
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=tolerance)
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    if recipe.model.dtype == "float32":
        assert_same(trained, {name: one.detach() for name, one in lora_of(whole).items()}, 2e-4)


@pytest.mark.parametrize("key", ["cosine, a share of warm-up", "epochs", "dropout"])
def test_a_run_that_is_resumed_has_the_rates_and_masks_of_one_that_was_not(
    key: str, models: Models, tmp_path: Path
) -> None:
    recipe = recipe_of(models, tmp_path, KEYS[key])
    expected = federate(recipe, RunDirectory.create(tmp_path / "run", recipe))
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    for file in (tmp_path / "stopped").rglob(f"round-{ROUNDS:04d}.pt"):
        file.unlink()
    torch.manual_seed(5)
    assert_same(federate(recipe, RunDirectory.open(tmp_path / "stopped")), expected, 0.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_of_a_16_bit_base_train_as_pefts(dtype: str, twins_of: BuildTwins) -> None:
    """To the last bit, and with moments in fp32: no step is lost to 16 bits, or to an epsilon that is zero there."""
    sections = {"model": {"dtype": dtype}, "train": {"steps": 4, "learning_rate": 1e-4}}
    twins = twins_of("llama", (1, 2), sections=sections, moved=False)
    before = twins.split_adapter()
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
        for model in twins.both
    ]
    twins.rounds.begin(1, ["a"])
    for number, batch in enumerate(islice(even_batches(padding=False), 4), 1):
        split, whole = (train_step(model, own, batch) for model, own in zip(twins.both, optimizers, strict=True))
        assert split.loss == whole.loss
        twins.rounds.commit(1, number, split.weight)
    after = twins.split_adapter()
    assert_same(after, {name: tensor.detach() for name, tensor in lora_of(twins.whole).items()}, 0.0)
    trained = [name for name, one in lora_of(twins.whole).items() if one.requires_grad]
    assert all((after[name] != before[name]).float().mean() > 0.95 for name in trained if "lora_B" in name)
    moments = [one for state in optimizers[0].state.values() for one in state.values()]
    assert {one.dtype for one in moments} == {torch.float32}


class Masked(torch.nn.Module):
    """Dropout with the masks of a key."""

    def __init__(self, key: str, chance: float) -> None:
        super().__init__()
        self._key, self._chance = key, chance

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        shape = (x_BLD[..., 0].numel(), x_BLD.shape[-1])
        return x_BLD * dropout_mask(self._key, shape, self._chance, x_BLD.device).view_as(x_BLD)


def test_the_trunks_dropout_is_pefts_with_its_own_masks(twins_of: BuildTwins) -> None:
    """In training mode and no other; a step's graph that is computed again has the same masks."""
    twins = twins_of("llama", (1, 2), sections={"lora": {"dropout": 0.4}, "train": {"steps": 2}})
    for name, module in twins.whole.named_modules():
        if not name.endswith("lora_dropout"):
            continue
        own = name.removeprefix("base_model.model.").removesuffix(".lora_dropout")
        inside = 1 <= int(own.split(".")[2]) < 3
        module["default"] = Masked(f"0/a/1/0/{own}" if inside else own, 0.4)
        if not inside:
            part = twins.split.bottom if int(own.split(".")[2]) < 1 else twins.split.top
            for inner, one in part.model.named_modules():
                if part.uncut_name(inner) == f"{own}.lora_dropout":
                    one["default"] = Masked(own, 0.4)
    batch = next(even_batches(padding=False)).inputs()
    twins.rounds.begin(1, ["a"])
    twins.split.train()
    split, whole = (model(**batch).loss for model in twins.both)
    assert torch.equal(split, whole)
    opened = twins.service._training.open_step("a", 1)
    opened.version -= 1  # as after a step of another silo
    split.backward()
    whole.backward()
    gradients = {name: one.grad for name, one in lora_of(twins.whole).items() if one.grad is not None}
    own = {name: one for name, one in twins.split_gradients().items() if one is not None}
    assert_same(own, gradients, 1e-6)
    assert not torch.equal(twins.split(**batch).loss, split), "the next forward has other masks"
    twins.split.eval()
    assert torch.equal(*(twins.split(**batch).loss for _ in range(2)))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, of transformers
@pytest.mark.parametrize("key", ["nothing", "rslora", "all linear", "dropout", "a start", "16-bit trunk"])
def test_the_uncut_model_with_the_exported_adapter_is_the_run(key: str, models: Models, tmp_path: Path) -> None:
    """To the last bit with the adapter beside the weights, by rounding once it is merged into them."""
    sections = KEYS.get(key, {"trunk": {"dtype": "bfloat16"}} if key == "16-bit trunk" else {})
    if key == "a start":
        first = recipe_of(models, tmp_path, {})
        federate(first, RunDirectory.create(tmp_path / "first", first))
        export_adapter(RunDirectory.open(tmp_path / "first"), tmp_path / "adapter")
        sections = {"lora": {"start": str(tmp_path / "adapter")}}
    recipe = recipe_of(models, tmp_path, sections)
    run = RunDirectory.create(tmp_path / "run", recipe)
    trained = federate(recipe, run)
    assert export_adapter(run, tmp_path / "out") == ROUNDS
    whole = PeftModel.from_pretrained(uncut(Path(recipe.model.path)), str(tmp_path / "out")).eval()
    assert_same({name: one.detach() for name, one in lora_of(whole).items()}, trained, 0.0)
    trunk = TrunkService(recipe, run.role("trunk"))
    silo = join(recipe, "a", channel=loopback(trunk, "a", recipe), fresh=True)
    for part in silo.parts:
        adapters.load_adapter(part, trained)
    batch = ragged("left", lengths=(12, 12))
    with torch.no_grad():
        split, beside = silo.model(**batch).logits, whole(**batch).logits
        merged, base = (model(**batch).logits for model in (whole.merge_and_unload(), uncut(Path(recipe.model.path))))
    if key == "16-bit trunk":  # no uncut model has two types: it differs by the trunk's rounding
        assert 0 < distance(split, beside) < 0.05
    else:
        assert torch.equal(split, beside)
        assert distance(merged, split) < 1e-4
        assert distance(base, split) > 1e-3
    silo.close()
    trunk.stop()


def test_silos_of_unequal_rows_make_as_many_passes(models: Models, tmp_path: Path) -> None:
    """Nobody waits for the longer one, and every round ends for all."""
    recipe = recipe_of(models, tmp_path, {"train": {"epochs": 2, "schedule": "cosine", "batch": 2}})
    rows = [{"text": f"w{10 + n} w{11 + n}", "reply": f"w{40 + n}"} for n in range(3)]
    short = recipe.silo[0].model_copy(update={"name": "b", "train": (str(write_rows(tmp_path / "b.jsonl", rows)),)})
    recipe = recipe.model_copy(update={"silo": (*recipe.silo, short)})
    run = RunDirectory.create(tmp_path / "run", recipe)
    federate(recipe, run)
    for name, steps in (("a", 8), ("b", 4)):
        lines = [one for one in read_journal(run.role(name).path / "metrics.jsonl") if one["event"] == "step"]
        assert [(one["round"], one["step"]) for one in lines] == [
            (round, step) for round in (1, 2) for step in range(1, steps // 2 + 1)
        ]
        assert read_progress(run, name, None).steps == steps
    taken = [line["silos"] for line in read_journal(run.role("trunk").path / "metrics.jsonl")]
    assert taken == [["a", "b"], ["a", "b"], ["a"], ["a"]] * ROUNDS
    assert run.completed() == ROUNDS
