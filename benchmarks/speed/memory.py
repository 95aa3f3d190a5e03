"""A silo's peak memory in training: of the uncut model's, and with a large vocabulary.

``make bench-memory``, or ``python -m benchmarks.speed.memory PART ...`` for some parts: ``silo``, ``vocabulary``,
``pieces``. Each party is a fresh process; what it holds before it has loaded anything is that of one that has only
imported the libraries. Every position has a label, so that nothing is saved on prompts.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.common import memory
from benchmarks.common.results import Results
from benchmarks.speed.foundation import BATCH, CACHE, LENGTH, bench_recipe, in_turn, uncut
from isthmus.data.tokens import Batch, Tokens, collate
from isthmus.demo.assets import smollm2
from isthmus.engines.local import at_address, local_recipe, serving
from isthmus.recipe import Recipe
from isthmus.silo.join import join
from isthmus.silo.trainer import train_step
from isthmus.storage.record import RunDirectory

STEPS = 3
VOCABULARY, BLOCKS = 151_936, 6
"""Qwen's vocabulary behind SmolLM2's width; a silo of cut (2, 2) is the same with any number of blocks."""
ROWS, LONG = 4, 1024
PAIRS = 12


def main() -> None:
    """All of it, or the parts that are named."""
    if sys.argv[1:2] == ["process"]:
        kind, path, address, rows, length = sys.argv[2:]
        print(json.dumps(peak_of(kind, Path(path), address, int(rows), int(length))))
        return
    parts: dict[str, Callable[[Results], None]] = {
        "silo": measure_silo,
        "vocabulary": measure_vocabulary,
        "pieces": measure_pieces,
    }
    results = Results("memory", "make bench-memory")
    for part in sys.argv[1:] or parts:
        parts[part](results)
    print(f"written: {results.write(keep=len(sys.argv) > 1)}")


def measure_silo(results: Results) -> None:
    """SmolLM2: the peak of a silo's process and of the uncut model's, above that of the libraries."""
    with served(bench_recipe(smollm2(CACHE))) as (run, address):
        empty, silo, whole = (peak(kind, run, address, BATCH, LENGTH) for kind in ("empty", "silo", "uncut"))
    name = f"SmolLM2, {BATCH} × {LENGTH}, peak above the libraries'"
    results.add(f"{name}: silo", (silo - empty) / 1e6, "MB")
    results.add(f"{name}: uncut", (whole - empty) / 1e6, "MB")
    results.add(f"{name}: silo / uncut", (silo - empty) / (whole - empty), "ratio", at_most=0.35)


def measure_vocabulary(results: Results) -> None:
    """Qwen's vocabulary: the peak of the silo's process, the libraries included, and above theirs."""
    recipe = bench_recipe(large_vocabulary(Path("build/memory")))
    name = f"vocabulary of {VOCABULARY}, {ROWS} × {LONG}, silo's peak"
    with served(recipe) as (run, address):
        empty, kept = (peak(kind, run, address, ROWS, LONG) for kind in ("empty", "silo"))
    with served(recomputing(recipe)) as (run, address):
        again = peak("silo", run, address, ROWS, LONG)
    results.add(f"{name}, activations kept, libraries included", kept / 1e9, "GB")
    results.add(f"{name}, activations kept, above the libraries'", (kept - empty) / 1e9, "GB")
    results.add(f"{name}, recomputed, libraries included", again / 1e9, "GB", at_most=1.2)
    results.add(f"{name}, recomputed, above the libraries'", (again - empty) / 1e9, "GB")


def recomputing(recipe: Recipe) -> Recipe:
    """The same recipe whose silo computes its activations again."""
    return recipe.model_copy(update={"silo": tuple(one.model_copy(update={"recompute": True}) for one in recipe.silo)})


def measure_pieces(results: Results) -> None:
    """Time of a silo's step with its loss in pieces, over that with all logits, in turn."""
    with served(bench_recipe(smollm2(CACHE))) as (run, address):
        silo = join(at_address(run.recipe(), address), "bench")
        adam = optimizer_of(silo.model)
        batch, number = batch_of(BATCH, LENGTH), 0
        silo.rounds.begin(1, ["bench"])

        def commit() -> None:
            nonlocal number
            number += 1
            silo.rounds.commit(1, number, float(batch.weight))

        def in_pieces() -> None:
            train_step(silo.model, adam, batch)
            commit()

        def with_logits() -> None:
            adam.zero_grad()
            silo.model(**batch.inputs(), use_cache=False).loss.backward()
            adam.step()
            commit()

        ratios = [one / other for one, other in in_turn(in_pieces, with_logits, PAIRS)]
        silo.close()
    name = f"training step {BATCH} × {LENGTH}: time, loss in pieces / all logits"
    results.add(name, statistics.median(ratios), "ratio")
    results.add(f"{name}, lowest pair", min(ratios), "ratio")
    results.add(f"{name}, highest pair", max(ratios), "ratio")


@contextmanager
def served(recipe: Recipe) -> Iterator[tuple[RunDirectory, str]]:
    """A run of this recipe whose trunk and root serve, and their address."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "run"
        run = RunDirectory.create(path, local_recipe(recipe, path))
        with serving(run) as (_, address):
            yield run, address


def peak(kind: str, run: RunDirectory, address: str, rows: int, length: int) -> int:
    """Most bytes that a fresh process held at once."""
    command = [sys.executable, "-m", "benchmarks.speed.memory", "process", kind, str(run.path), address]
    printed = subprocess.run([*command, str(rows), str(length)], check=True, capture_output=True).stdout
    return int(json.loads(printed.splitlines()[-1]))


def peak_of(kind: str, path: Path, address: str, rows: int, length: int) -> int:
    """Most bytes that this process has held at once, loading included, after some training steps.

    Args:
        kind: ``silo``; ``uncut``, the whole model in one process; or ``empty``, which has only imported the libraries.
    """
    if kind != "empty":
        recipe = at_address(RunDirectory.open(path).recipe(), address)
        silo = kind == "silo"
        model = join(recipe, "bench").model if silo else uncut(recipe)
        adam, batch = optimizer_of(model), batch_of(rows, length)
        for _ in range(STEPS):
            train_step(model, adam, batch)
    return memory.peak()


def optimizer_of(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=5e-4)


def batch_of(rows: int, length: int) -> Batch:
    """Random rows of one length, with a label at every position."""
    ids = torch.randint(100, 40_000, (rows, length + 1)).tolist()
    return collate([Tokens(row[:1], row[1:]) for row in ids], 0)


def large_vocabulary(folder: Path) -> Path:
    """A random model of SmolLM2's width with Qwen's vocabulary, made once."""
    if not (folder / "model.safetensors").exists():
        shutil.copytree(smollm2(CACHE), folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        config = AutoConfig.from_pretrained(folder, vocab_size=VOCABULARY, num_hidden_layers=BLOCKS)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
