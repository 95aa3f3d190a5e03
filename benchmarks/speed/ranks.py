"""A trunk over ranks that torchrun starts, beside one alone: how far apart, how large, how long.

``make bench-ranks``. All trunks are there at a time, and each step is taken with one after another. On few cores the
ranks wait for one another: what is shown is that they compute the same and share the memory, not that they are fast.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.common.ports import free_port
from benchmarks.common.results import Results, repeated
from benchmarks.speed.foundation import CACHE, bench_recipe
from benchmarks.speed.memory import batch_of, optimizer_of
from isthmus.demo.assets import smollm2
from isthmus.engines.certificates import make_certificates
from isthmus.engines.local import at_address, local_recipe
from isthmus.engines.process import LISTENING
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, join
from isthmus.silo.trainer import train_step
from isthmus.storage.record import RunDirectory

RANKS = (1, 2, 4)
STEPS, BATCH, LENGTH = 10, 2, 128
PROMPT, ANSWER = 64, 16
ROUNDS = 5
"""Answers of each trunk, in turn."""
GOAL = 1e-5
WAIT = 300.0


def main() -> None:
    results = Results("ranks", "make bench-ranks")
    with ExitStack() as stack:
        trunks = {count: stack.enter_context(served(bench(smollm2(CACHE)), count)) for count in RANKS}
        note_memory(results, trunks)
        silos = {count: stack.enter_context(join(one.recipe, "bench")) for count, one in trunks.items()}
        compare_logits(results, silos)
        compare_answers(results, silos)
        compare_training(results, silos, trunks)
    print(f"written: {results.write()}")


def bench(folder: Path) -> Recipe:
    """SmolLM2 cut (2, 2), without noise, which would differ; one round of STEPS. What crosses is not rounded."""
    keys = bench_recipe(folder).model_dump(mode="json", exclude_none=True)
    keys["boundary"]["forward"]["noise"] = keys["boundary"]["gradient"]["noise"] = 0.0
    return Recipe.of({**keys, "train": {**keys["train"], "rounds": 1, "steps": STEPS, "batch": BATCH}})


@dataclass(frozen=True)
class Trunk:
    """A trunk that serves, and the processes of its ranks in order."""

    recipe: Recipe
    run: RunDirectory
    ranks: list[psutil.Process]


@contextmanager
def served(recipe: Recipe, count: int) -> Iterator[Trunk]:
    """A trunk over so many ranks while the block runs; of one rank, without torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.create(Path(folder) / "run", local_recipe(recipe, Path(folder) / "run"))
        own = run.recipe()
        make_certificates(own, Path(own.wire.certificates))
        address = f"localhost:{free_port()}"
        torchrun = ("torch.distributed.run", f"--nproc-per-node={count}", f"--master-port={free_port()}", "-m")
        command = [sys.executable, "-m", *(torchrun if count > 1 else ()), "isthmus", "trunk", str(run.recipe_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        log = Path(folder) / "log"
        with log.open("wb") as out:
            started = psutil.Popen(
                [*command, "--address", address, "--run-dir", str(run.path)], stdout=out, stderr=out, env=environment
            )
        try:
            wait_listening(started, log)
            found = [one for one in started.children(recursive=True) if "RANK" in one.environ()] or [started]
            ranks = sorted(found, key=lambda one: int(one.environ().get("RANK", 0)))
            yield Trunk(at_address(own, address), run, ranks)
        finally:
            if started.poll() is None:
                started.terminate()
                started.wait(WAIT)


def wait_listening(process: psutil.Popen, log: Path) -> None:
    end = time.monotonic() + WAIT
    while LISTENING not in log.read_text():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(log.read_text())
        time.sleep(0.1)


def note_memory(results: Results, trunks: Mapping[int, Trunk]) -> None:
    """What each rank has in memory once it is ready, above a process that has imported what ranks import."""
    code = "import isthmus.engines.roles, isthmus.engines.torchrun, resource; print(open('/proc/self/status').read())"
    status = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    libraries = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))
    results.add("resident memory: libraries alone", libraries / 1e6, "MB")
    for count, trunk in trunks.items():
        for rank, process in enumerate(trunk.ranks):
            above = process.memory_info().rss - libraries
            results.add(f"resident memory above the libraries': {name_of(count)}, rank {rank}", above / 1e6, "MB")


def compare_logits(results: Results, silos: Mapping[int, Silo]) -> None:
    ids = torch.randint(100, 40_000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = {count: silo.model(input_ids=ids, use_cache=False).logits for count, silo in silos.items()}
    results.add("largest logit of the trunk alone", float(logits[1].abs().max()), "")
    for count in RANKS[1:]:
        add_distance(results, f"{name_of(count)}: largest difference of logits", [(logits[count], logits[1])])


def compare_answers(results: Results, silos: Mapping[int, Silo]) -> None:
    """Greedy answers with KV caches: their tokens, and the time of each."""
    ids = torch.randint(100, 40_000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    how = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 2}
    seconds: dict[int, list[float]] = {count: [] for count in silos}
    answers = {}
    for _ in range(ROUNDS):
        for count, silo in silos.items():
            started = time.perf_counter()
            answers[count] = silo.model.generate(ids, **how)
            seconds[count].append((time.perf_counter() - started) / ANSWER)
    for count in RANKS[1:]:
        different = int((answers[count] != answers[1]).sum())
        results.add(f"{name_of(count)}: tokens of {ANSWER} that differ", different, "tokens", at_most=0)
    note_times(results, "a token", seconds)


def compare_training(results: Results, silos: Mapping[int, Silo], trunks: Mapping[int, Trunk]) -> None:
    """AdamW steps on the same rows: losses, the trunk's adapter after them, and the time of each step."""
    adams, seconds, losses = {}, {count: [] for count in silos}, {count: [] for count in silos}
    for count, silo in silos.items():
        silo.rounds.begin(1, ["bench"])
        adams[count] = optimizer_of(silo.model)
    for number in range(1, STEPS + 1):
        torch.manual_seed(number)
        batch = batch_of(BATCH, LENGTH)
        for count, silo in silos.items():
            started = time.perf_counter()
            losses[count].append(train_step(silo.model, adams[count], batch).loss)
            silo.rounds.commit(1, number, float(batch.weight))
            seconds[count].append(time.perf_counter() - started)
    adapters = {count: trunk.run.role("trunk").load_round(1)["adapter"] for count, trunk in trunks.items()}
    for count in RANKS[1:]:
        pairs = [(torch.tensor(losses[count]), torch.tensor(losses[1]))]
        add_distance(results, f"{name_of(count)}: largest difference of {STEPS} losses", pairs)
        pairs = [(adapters[count][name], one) for name, one in adapters[1].items()]
        add_distance(results, f"{name_of(count)}: largest difference of the adapter after {STEPS} steps", pairs)
    note_times(results, f"a training step {BATCH} × {LENGTH}", seconds)


def add_distance(results: Results, measure: str, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """The largest difference, in units of 1e-6: rows have four decimals."""
    largest = max(float((one - other).abs().max()) for one, other in pairs)
    results.add(measure, largest * 1e6, "1e-6", at_most=GOAL * 1e6)


def note_times(results: Results, what: str, seconds: Mapping[int, list[float]]) -> None:
    for count, own in seconds.items():
        results.add(f"{name_of(count)}: {what}, median", 1e3 * statistics.median(own), "ms")
    for count in RANKS[1:]:
        ratios = [one / other for one, other in zip(seconds[count], seconds[1], strict=True)]
        repeated(results, f"{name_of(count)}: {what}, time over that of a trunk alone", ratios, "ratio")


def name_of(count: int) -> str:
    return "alone" if count == 1 else f"{count} ranks"


if __name__ == "__main__":
    main()
