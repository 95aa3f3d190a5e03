"""A trunk in 16, 8 and 4 bits on a processor: decoding against the uncut model in fp32, memory, and the cost in loss.

``make bench-weights``, or ``python -m benchmarks.speed.weights PART ...`` for some of: ``decode``, ``shape``,
``step``, ``memory``, ``loss``, ``training``.
Trunk and silo are two processes on the cores that the uncut model has; all models decode in turn.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.common.results import Results, note, repeated
from benchmarks.common.rows import read
from benchmarks.federated.bytes import BATCH, EPOCHS, drawn
from benchmarks.federated.corpora import ALL_TARGETS, rows_file
from benchmarks.federated.simulation import merged
from benchmarks.speed.foundation import ANSWER, CACHE, LENGTH, PROMPT, bench_recipe, seconds, uncut
from benchmarks.speed.foundation import BATCH as ROWS
from benchmarks.speed.memory import batch_of, optimizer_of, served
from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Tokens, collate, epochs
from isthmus.demo.assets import hutto, smollm2
from isthmus.engines.local import at_address
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.optim import build_optimizer
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, join, load_ends
from isthmus.silo.trainer import answer_loss, evaluate, train_step
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService

PAIRS = 8
KINDS = {
    "fp32": {},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
    "nf4": {"weights": "nf4"},
}
"""The trunk's keys."""
ENDS = {"int8 ends": ("int8", "int8"), "int4 and int8 ends": ("int4", "int8")}
"""The weights of the trunk, and of the silo."""
DECODING = ("fp32", "bf16", "int8", "int4", *ENDS)
"""Those that a processor decodes with."""
GOAL = 1.6
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_hidden_layers": 10,
}
"""Llama-3.2-1B's blocks, 10 of the 16, behind SmolLM2's vocabulary."""
TEXTS, TOKENS = 64, 96
"""Held-out rows, and the most tokens of each."""
TRAINED, SEEDS = ("bf16", "int4", "nf4"), (1, 2, 3, 4, 5, 6)
RATE = 1e-3
WORSE, SMALL = 1.0, 0.3
"""Goals of 4 bits: % of loss lost, and memory of the 16-bit trunk's, at most."""


def main() -> None:
    """All of it, or the parts that are named."""
    parts: dict[str, Callable[[Results], None]] = {
        "decode": measure_decode,
        "shape": measure_shape,
        "step": measure_step,
        "memory": measure_memory,
        "loss": measure_loss,
        "training": measure_training,
    }
    results = Results("weights", "make bench-weights")
    for part in sys.argv[1:] or parts:
        parts[part](results)
    print(f"written: {results.write(keep=len(sys.argv) > 1)}")


def measure_decode(results: Results) -> None:
    """SmolLM2 as it is."""
    measure(results, "SmolLM2", smollm2(CACHE), ANSWER, at_least=GOAL)


def measure_shape(results: Results) -> None:
    """Random weights in larger blocks, where reading them is all that counts."""
    kinds = ("bf16", "int8", "int4", *ENDS)
    measure(results, "blocks of a model of 1B", larger_blocks(Path("build/weights")), ANSWER // 4, kinds)


def measure(
    results: Results,
    name: str,
    folder: Path,
    tokens: int,
    kinds: Sequence[str] = DECODING,
    *,
    at_least: float | None = None,
) -> None:
    """Tokens per second of each kind of trunk over the uncut model's, with the prompt's pass and without it, round by
    round."""
    recipe = bench_recipe(folder)
    ids = torch.randint(100, 40_000, (1, PROMPT))

    def generate(model: PreTrainedModel, count: int = tokens) -> float:
        how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 2}
        return seconds(lambda: model.generate(ids, **how))

    with ExitStack() as stack:
        models = {"uncut": uncut(recipe).eval()}
        models |= {kind: silo_with(stack, recipe, kind).model for kind in kinds}
        for model in models.values():
            generate(model)
        rounds = [{kind: generate(model) for kind, model in models.items()} for _ in range(PAIRS)]
        prompts = [{kind: generate(model, 1) for kind, model in models.items()} for _ in range(PAIRS)]
    for kind in models:
        repeated(results, f"{name}: {kind}", [tokens / one[kind] for one in rounds], "tokens/s")
        repeated(results, f"{name}: {kind}, prompt and one token", [1000 * one[kind] for one in prompts], "ms")
    for kind in kinds:
        ratios = [one["uncut"] / one[kind] for one in rounds]
        goal = at_least if kind.startswith("int8") else None
        repeated(results, f"{name}: {kind} trunk, tokens/s over uncut fp32", ratios, "ratio", at_least=goal)
        later = [
            (one["uncut"] - first["uncut"]) / (one[kind] - first[kind])
            for one, first in zip(rounds, prompts, strict=True)
        ]
        repeated(results, f"{name}: {kind} trunk, tokens after the first, over uncut fp32", later, "ratio")


def silo_with(stack: ExitStack, recipe: Recipe, kind: str) -> Silo:
    """A silo whose trunk has weights of this kind."""
    keys = recipe.model_dump(mode="json", exclude_none=True)
    trunk, ends = ({"weights": ENDS[kind][0]}, ENDS[kind][1]) if kind in ENDS else (KINDS[kind], None)
    silos = [{**one, "weights": ends} for one in keys["silo"]] if ends else keys["silo"]
    own = Recipe.of(merged(keys, {"trunk": trunk, "silo": silos}))
    run, address = stack.enter_context(served(own))
    return stack.enter_context(join(at_address(run.recipe(), address), "bench"))


def measure_memory(results: Results) -> None:
    """Bytes of all that a trunk keeps of its base model, over those of its weights in 16 bits."""
    for name, folder in (
        ("SmolLM2", smollm2(CACHE)),
        ("blocks of a model of 1B", larger_blocks(Path("build/weights"))),
    ):
        kept = {kind: kept_bytes(folder, kind) for kind in KINDS}
        for kind, own in kept.items():
            results.add(f"{name}: {kind} trunk keeps", own / 1e6, "MB")
        for kind, goal in (("int8", None), ("int4", SMALL), ("nf4", SMALL)):
            results.add(f"{name}: {kind} trunk over bf16 trunk", kept[kind] / kept["bf16"], "ratio", at_most=goal)
        for weights in (None, "int8", "int4", "nf4"):
            results.add(f"{name}: silo keeps, {weights or 'fp32'}", silo_bytes(folder, weights) / 1e6, "MB")


def silo_bytes(folder: Path, weights: str | None) -> int:
    """Of all numbers of a silo's ends, without their adapters; what a tied embedding and head share, once."""
    ends = load_ends(Checkpoint(str(folder)), bench_recipe(folder), weights=weights)
    kept = [one for part in ends for one in (*part.parameters(), *part.buffers()) if not one.requires_grad]
    return sum({one.data_ptr(): one.nbytes for one in kept}.values())


def kept_bytes(folder: Path, kind: str) -> int:
    """Of weights, scales, zeros and all other numbers of a trunk, without its adapter."""
    keys = bench_recipe(folder).model_dump(mode="json", exclude_none=True)
    recipe = Recipe.of(merged(keys, {"trunk": KINDS[kind]}))
    with tempfile.TemporaryDirectory() as temporary:
        service = TrunkService(recipe, RoleDirectory(Path(temporary)))
        part = service._runner.part
        kept = sum(one.nbytes for one in (*part.parameters(), *part.buffers()) if not one.requires_grad)
        service.stop()
    return kept


def measure_loss(results: Results) -> None:
    """Mean loss of SmolLM2 on held-out rows of the demo's silos, in nats a token; without noise, which would differ."""
    keys = bench_recipe(smollm2(CACHE)).model_dump(mode="json", exclude_none=True)
    keys["boundary"]["forward"]["noise"] = 0.0
    recipe = Recipe.of(keys)
    losses = {}
    for kind in (*KINDS, *ENDS):
        with ExitStack() as stack:
            losses[kind] = held_out_loss(silo_with(stack, recipe, kind))
            results.add(f"SmolLM2: held-out loss, {kind} trunk", losses[kind], "nats")
    for kind in tuple(losses)[1:]:
        results.add(f"SmolLM2: held-out loss, {kind} trunk less fp32 trunk", losses[kind] - losses["fp32"], "nats")


@torch.no_grad()
def held_out_loss(silo: Silo) -> float:
    silos = hutto(CACHE, rows=160, held_out=60, seed=1).values()
    total, weight = 0.0, 0
    for text in [row["text"] for files in silos for row in read(files.held_out)[: TEXTS // len(silos)]]:
        ids = silo.tokenizer(text)["input_ids"][:TOKENS]
        if len(ids) > 1:
            batch = collate([Tokens(ids[:1], ids[1:])], 0)
            total += float(answer_loss(silo.model, batch)) * batch.supervised
            weight += batch.supervised
    return total / weight


def measure_step(results: Results) -> None:
    """Seconds of a training step with each kind of trunk, round by round."""
    with ExitStack() as stack:
        step_of = {kind: stepping(silo_with(stack, bench_recipe(smollm2(CACHE)), kind)) for kind in KINDS}
        for step in step_of.values():
            step()
        rounds = [{kind: seconds(step) for kind, step in step_of.items()} for _ in range(PAIRS)]
    for kind in KINDS:
        repeated(results, f"SmolLM2: training step, {kind} trunk", [one[kind] for one in rounds], "s")
    for kind in tuple(KINDS)[1:]:
        ratios = [one[kind] / one["fp32"] for one in rounds]
        repeated(results, f"SmolLM2: training step, {kind} trunk over fp32 trunk", ratios, "ratio")


def stepping(silo: Silo) -> Callable[[], None]:
    """What makes one step of this silo and its trunk."""
    optimizer, batch, numbers = optimizer_of(silo.model), batch_of(ROWS, LENGTH), count(1)
    silo.rounds.begin(1, ["bench"])

    def step() -> None:
        train_step(silo.model, optimizer, batch)
        silo.rounds.commit(1, next(numbers), float(batch.weight))

    return step


def measure_training(results: Results) -> None:
    """Held-out loss of SmolLM2 after training on summaries of conversations, in one silo, with each kind of trunk."""
    losses: dict[str, list[float]] = {kind: [] for kind in TRAINED}
    for seed in SEEDS:
        for kind, own in losses.items():
            own.append(trained_loss(kind, seed))
            print(f"{kind}, seed {seed}: {own[-1]:.4f}", flush=True)
    for kind, own in losses.items():
        note(results, f"SmolLM2: held-out loss after training, {kind} trunk", own, "nats")
        if kind != "bf16":
            worse = [100 * (one / other - 1) for one, other in zip(own, losses["bf16"], strict=True)]
            note(results, f"SmolLM2: loss after training, {kind} trunk above bf16 trunk", worse, "%", at_most=WORSE)


def trained_loss(kind: str, seed: int) -> float:
    """Mean loss on held-out rows, in nats a token of the answers, of a silo and a trunk of this kind."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        recipe = training_recipe(Path(folder), seed)
        silo = silo_with(stack, recipe, kind)
        data = SiloData(recipe.silo[0], recipe, silo.tokenizer)
        optimizer = build_optimizer([one for one in silo.model.parameters() if one.requires_grad], recipe.train)
        batches = epochs(data.train, BATCH, f"{seed}")
        silo.rounds.begin(1, ["bench"])
        for number in range(1, EPOCHS * len(data.train) // BATCH + 1):
            step = train_step(silo.model, optimizer, collate(next(batches), data.pad))
            silo.rounds.commit(1, number, step.weight)
        return evaluate(silo.model, data, size=BATCH)["loss"]


def training_recipe(folder: Path, seed: int) -> Recipe:
    """Its rows are other ones with each seed, the held-out ones always the same."""
    known, unseen = drawn(seed)
    rows = [row for own in known.values() for row in own]
    keys = bench_recipe(smollm2(CACHE)).model_dump(mode="json", exclude_none=True)
    files = {
        "train": str(rows_file(folder / "train.jsonl", rows)),
        "held_out": str(rows_file(folder / "held.jsonl", unseen)),
    }
    changes = {
        "seed": seed,
        "boundary": {path: {"noise": 0.0} for path in ("forward", "gradient", "update")},
        "lora": {"rank": 8, "alpha": 16.0, "targets": ALL_TARGETS},
        "task": {"name": "mts_dialog", "truncate": "middle"},
        "train": {"max_tokens": 384, "learning_rate": RATE},
        "federation": {"lora": "plain"},
        "silo": [{**keys["silo"][0], **files}],
    }
    return Recipe.of(merged(keys, changes))


def larger_blocks(folder: Path) -> Path:
    """A random model with SHAPE, made once."""
    if not (folder / "model.safetensors").exists():
        shutil.copytree(smollm2(CACHE), folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        config = AutoConfig.from_pretrained(folder, **SHAPE)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="20GB")
    return folder


if __name__ == "__main__":
    main()
