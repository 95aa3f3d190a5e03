"""Split against uncut on SmolLM2-135M: training step, decoding, the wire, and memory.

``make bench-foundation``, or ``python -m benchmarks.speed.foundation PART ...`` for some of its parts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.common import memory
from benchmarks.common.bare import made_up
from benchmarks.common.proxy import CountingProxy
from benchmarks.common.results import Results
from isthmus.demo.assets import smollm2
from isthmus.engines.local import at_address, local_recipe, serving
from isthmus.model.adapters import add_adapter
from isthmus.model.cut import Part
from isthmus.model.families import family_of
from isthmus.model.split import SplitForCausalLM
from isthmus.recipe import Recipe
from isthmus.silo.join import join
from isthmus.silo.remote import RemoteTrunk
from isthmus.storage.record import RunDirectory
from isthmus.wire import isthmus_pb2 as pb

CACHE = Path("build/demo")
BATCH, LENGTH = 2, 128
PROMPT, ANSWER = 256, 64
PAIRS = 12


def main() -> None:
    """All of it, or the parts that are named: ``wire``, ``models`` (step and decoding), ``memory``."""
    if sys.argv[1:2] == ["process"]:
        print(json.dumps(memory_of(sys.argv[2], Path(sys.argv[3]), sys.argv[4])))
        return
    parts = {"wire": measure_wire, "models": measure_models, "memory": measure_memory}
    results = Results("foundation", "make bench-foundation")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "run"
        run = RunDirectory.create(path, local_recipe(bench_recipe(smollm2(CACHE)), path))
        with serving(run) as (_, address):
            for part in sys.argv[1:] or parts:
                parts[part](results, run, address)
    print(f"written: {results.write(keep=len(sys.argv) > 1)}")


def bench_recipe(folder: Path) -> Recipe:
    return Recipe.of(
        {
            "model": {"path": str(folder), "bottom": 2, "top": 2},
            "train": {"evaluate": False, "steps": 100_000},
            "silo": [{"name": "bench", "train": "none.jsonl"}],
        }
    )


def uncut(recipe: Recipe) -> PreTrainedModel:
    """The recipe's whole model with adapters on every block, trained as the split model's parts are."""
    return adapted(AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32), recipe)


def adapted(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """A whole model, given those adapters."""
    model.requires_grad_(False)
    part = Part("trunk", model, family_of(model.config), 0)
    add_adapter(part, recipe.lora, recipe.seed, freeze_a=False)
    ends = {*range(recipe.model.bottom), *range(model.config.num_hidden_layers)[-recipe.model.top :]}
    for name, parameter in model.named_parameters():
        if "lora_A" in name and int(name.split("layers.")[1].split(".")[0]) in ends:
            parameter.requires_grad_(False)
    return model


def measure_models(results: Results, run: RunDirectory, address: str) -> None:
    """Training steps and decoding of the split model and the uncut one."""
    silo = join(at_address(run.recipe(), address), "bench")
    whole = uncut(run.recipe())
    measure_step(results, silo.model, "bench", whole, some_ids(whole, BATCH, LENGTH), at_most=1.10)
    measure_decode(results, silo.model, whole, some_ids(whole, 1, PROMPT), ANSWER)
    silo.close()


def measure_step(
    results: Results,
    split: SplitForCausalLM,
    silo: str,
    whole: PreTrainedModel,
    ids_BL: torch.Tensor,
    *,
    at_most: float,
) -> None:
    """Optimizer steps of the split model, whose trunk no other silo trains, and the uncut one in turn.

    Args:
        at_most: how many times as long a step of the split model may take, by the median pair.
    """
    assert isinstance(split.trunk, RemoteTrunk)
    rounds = split.trunk.rounds
    split_adam = torch.optim.AdamW([p for p in split.parameters() if p.requires_grad], lr=5e-4)
    whole_adam = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=5e-4)
    rounds.begin(1, [silo])
    number = 0

    def split_step() -> None:
        nonlocal number
        number += 1
        step(split, split_adam, ids_BL)
        rounds.commit(1, number, float(ids_BL[:, 1:].numel()))

    pairs = in_turn(split_step, lambda: step(whole, whole_adam, ids_BL), PAIRS)
    report_pairs(results, "training step {} × {}".format(*ids_BL.shape), pairs, "time, split / uncut", at_most=at_most)


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    """One step of the model's optimizer, done when this returns."""
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    wait_for(ids.device)


def measure_decode(
    results: Results, split: PreTrainedModel, whole: PreTrainedModel, ids: torch.Tensor, answer: int
) -> None:
    """Greedy generation after a long prompt, in turn."""

    def generate(model: PreTrainedModel) -> None:
        model.generate(ids, max_new_tokens=answer, min_new_tokens=answer, do_sample=False, pad_token_id=2)
        wait_for(ids.device)

    pairs = in_turn(lambda: generate(split), lambda: generate(whole.eval()), 6)
    rates = [(uncut_seconds / split_seconds) for split_seconds, uncut_seconds in pairs]
    results.add("decode: split tokens/s", answer / statistics.median(pair[0] for pair in pairs), "tokens/s")
    results.add("decode: uncut tokens/s", answer / statistics.median(pair[1] for pair in pairs), "tokens/s")
    results.add("decode: ratio of tokens/s, split / uncut", statistics.median(rates), "ratio", at_least=0.92)
    results.add("decode: ratio, lowest pair", min(rates), "ratio")
    results.add("decode: ratio, highest pair", max(rates), "ratio")


def measure_wire(results: Results, run: RunDirectory, address: str) -> None:
    """Empty round trips, and what really passes through the socket for one payload."""
    direct = join(at_address(run.recipe(), address), "bench")
    trips = [seconds(lambda: direct.trunk.channel.call(pb.Ping())) for _ in range(600)][100:]
    results.add("empty round trip, median", statistics.median(trips) * 1e3, "ms", at_most=1.0)
    results.add("empty round trip, 95th percentile", statistics.quantiles(trips, n=20)[-1] * 1e3, "ms")
    direct.close()
    h_TD, lengths = torch.randn(BATCH * LENGTH, 576), [LENGTH] * BATCH
    proxy = CountingProxy(address)
    silo = join(at_address(run.recipe(), proxy.address), "bench")
    before = proxy.up
    frames = 20
    for _ in range(frames):
        with torch.no_grad():
            silo.trunk(made_up(h_TD, lengths))
    payload = frames * h_TD.numel() * 4
    results.add("bytes through the socket for a payload byte", (proxy.up - before) / payload, "bytes", at_most=1.02)
    silo.close()
    proxy.close()


def measure_memory(results: Results, run: RunDirectory, address: str) -> None:
    """Memory of a silo's process and of the uncut model's, above that of one that has only imported the libraries."""
    kinds = ("empty", "silo", "uncut")
    measured = {kind: memory_in_a_process(kind, run, address) for kind in kinds}
    for what, bound in (("peak", 0.45), ("resident after a step", None)):
        empty, silo, whole = (measured[kind][what] for kind in kinds)
        results.add(f"memory above an empty torch process, {what}: silo", (silo - empty) / 1e6, "MB")
        results.add(f"memory above an empty torch process, {what}: uncut", (whole - empty) / 1e6, "MB")
        results.add(f"memory, {what}: silo / uncut", (silo - empty) / (whole - empty), "ratio", at_most=bound)


def memory_in_a_process(kind: str, run: RunDirectory, address: str) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.speed.foundation", "process", kind, str(run.path), address]
    told = subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1]
    found: dict[str, int] = json.loads(told)
    return found


def memory_of(kind: str, path: Path, address: str) -> dict[str, int]:
    """Bytes that this process takes.

    Args:
        kind: ``silo``; ``uncut``, the whole model in one process; or ``empty``, which has only imported the libraries.
    """
    if kind == "empty":
        return {"peak": memory.peak(), "resident after a step": memory.resident()}
    recipe = at_address(RunDirectory.open(path).recipe(), address)
    return memory_of_training(join(recipe, "bench").model if kind == "silo" else uncut(recipe))


def memory_of_training(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of this process: the peak, loading included, of three training steps, and the most that one left behind."""
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    ids = torch.randint(100, 40_000, (BATCH, LENGTH))
    after = []
    for _ in range(3):
        step(model, adam, ids)
        after.append(memory.resident())
    return {"peak": memory.peak(), "resident after a step": max(after)}


def in_turn(one: Callable[[], None], other: Callable[[], None], count: int) -> list[tuple[float, float]]:
    """Seconds of both, A B A B …, after a warm-up of each."""
    one(), other()
    return [(seconds(one), seconds(other)) for _ in range(count)]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def some_ids(model: PreTrainedModel, rows: int, length: int) -> torch.Tensor:
    """Tokens of the model's vocabulary, ``[rows, length]``, on its device."""
    return torch.randint(3, model.config.vocab_size, (rows, length), device=model.device)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report_pairs(results: Results, name: str, pairs: list[tuple[float, float]], what: str, *, at_most: float) -> None:
    ratios = [one / other for one, other in pairs]
    results.add(f"{name}: split", statistics.median(pair[0] for pair in pairs), "s")
    results.add(f"{name}: uncut", statistics.median(pair[1] for pair in pairs), "s")
    results.add(f"{name}: {what}", statistics.median(ratios), "ratio", at_most=at_most)
    results.add(f"{name}: ratio, lowest pair", min(ratios), "ratio")
    results.add(f"{name}: ratio, highest pair", max(ratios), "ratio")


if __name__ == "__main__":
    main()
