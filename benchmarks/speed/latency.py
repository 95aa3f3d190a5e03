"""Training over a long way: throughput at 50 ms a round trip against 0 ms, in one piece and in micro-batches.

``make bench-latency``.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from benchmarks.common.proxy import CountingProxy
from benchmarks.common.results import Results
from benchmarks.speed.foundation import bench_recipe, seconds
from isthmus.data.tokens import Batch, positions
from isthmus.demo.assets import smollm2
from isthmus.engines.local import at_address, local_recipe, serving
from isthmus.silo.join import Silo, join
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import train_step
from isthmus.storage.record import RunDirectory

CACHE = Path("build/demo")
ROUND_TRIP = 0.050
ROWS, LENGTH, MICRO_BATCHES, STEPS = 8, 64, 4, 9


def main() -> None:
    results = Results("latency", "make bench-latency")
    torch.set_num_threads(1)  # a core for the silo, one for the trunk, as if they were two machines
    with ExitStack() as stack:
        near, far = (Steps(stack.enter_context(connected(trip))) for trip in (0.0, ROUND_TRIP))
        for name, micro_batches, goal in (
            ("one piece", 1, None),
            (f"{MICRO_BATCHES} micro-batches", MICRO_BATCHES, 0.9),
        ):
            pairs = [(near.take(micro_batches), far.take(micro_batches)) for _ in range(STEPS)][1:]
            results.add(f"{name}: step at 0 ms", statistics.median(pair[0] for pair in pairs), "s")
            results.add(f"{name}: step at 50 ms", statistics.median(pair[1] for pair in pairs), "s")
            ratios = [near_seconds / far_seconds for near_seconds, far_seconds in pairs]
            results.add(f"{name}: throughput, 50 ms / 0 ms", statistics.median(ratios), "ratio", at_least=goal)
            results.add(f"{name}: throughput, lowest pair", min(ratios), "ratio")
            results.add(f"{name}: throughput, highest pair", max(ratios), "ratio")
    print(f"written: {results.write()}")


@contextmanager
def connected(round_trip: float) -> Iterator[Silo]:
    """A silo whose trunk, in a process of its own, is this many seconds away and back."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "run"
        recipe = bench_recipe(smollm2(CACHE)).model_copy(update={"threads": 1})
        run = RunDirectory.create(path, local_recipe(recipe, path))
        with serving(run) as (_, address):
            proxy = CountingProxy(address, round_trip / 2)
            silo = join(at_address(run.recipe(), proxy.address), "bench")
            yield silo
            silo.close()
            proxy.close()


class Steps:
    """Optimizer steps of one silo on the same made-up rows."""

    def __init__(self, silo: Silo) -> None:
        self._silo = silo
        self._number = 0
        self._optimizer = torch.optim.AdamW([p for p in silo.model.parameters() if p.requires_grad], lr=1e-5)
        ids, mask = torch.randint(100, 40_000, (ROWS, LENGTH)), torch.ones(ROWS, LENGTH, dtype=torch.long)
        self._batch = Batch(ids, mask, positions(mask), ids, torch.zeros(len(ids), dtype=torch.long))
        silo.rounds.begin(1, ["bench"])

    def take(self, micro_batches: int) -> float:
        """Seconds of one step, the trunk's included."""
        return seconds(lambda: self._step(micro_batches))

    def _step(self, micro_batches: int) -> None:
        if micro_batches == 1:
            step = train_step(self._silo.model, self._optimizer, self._batch)
        else:
            step = pipelined_step(self._silo.model, self._optimizer, self._batch, micro_batches)
        self._number += 1
        self._silo.rounds.commit(1, self._number, step.weight)


if __name__ == "__main__":
    main()
