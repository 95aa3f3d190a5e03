"""The network's share of a synchronized training step: eight far silos against one. ``make bench-silos``.

The model is so small that computing hardly counts. Each silo has its own stream and its own way to the trunk; network
time is what a step takes at 50 ms a round trip more than at 0 ms, in blocks of steps taken in turn.

Shapes: T tokens, D width.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.bare import BareSilo
from benchmarks.common.proxy import CountingProxy
from benchmarks.common.results import Results
from isthmus.engines.local import local_recipe, serving
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import connect, greeting
from isthmus.storage.record import RunDirectory

SILOS, WIDTH, LENGTHS = 8, 32, [16, 16]
ROUND_TRIP = 0.050
STEPS, BLOCKS = 10, 4
"""Steps in a block, the first of which is left out; blocks of each kind."""
Seconds = list[float]


def main() -> None:
    results = Results("silos", "make bench-silos")
    torch.set_num_threads(1)
    with trunk_process() as (run, address), ExitStack() as stack:
        silos = [stack.enter_context(connected(run.recipe(), number, address)) for number in range(SILOS)]
        rounds = Rounds(silos)
        taken: dict[tuple[int, float], Seconds] = {
            (count, trip): [] for count in (1, SILOS) for trip in (0.0, ROUND_TRIP)
        }
        for _ in range(BLOCKS):
            for (count, trip), seconds in taken.items():
                seconds += rounds.block(count, trip)
        report_times(results, taken)
        report_bytes(results, silos[0])
    print(f"written: {results.write()}")


@contextmanager
def trunk_process() -> Iterator[tuple[RunDirectory, str]]:
    """A trunk of a tiny Llama that all silos may train with."""
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        save_model(model)
        recipe = Recipe.of(
            {
                "threads": 1,
                "model": {"path": str(model), "bottom": 1, "top": 1},
                "train": {"evaluate": False, "steps": STEPS, "rounds": 4 * BLOCKS},
                "silo": [{"name": f"silo{number}", "train": "none.jsonl"} for number in range(SILOS)],
            }
        )
        path = Path(temporary) / "run"
        run = RunDirectory.create(path, local_recipe(recipe, path))
        with serving(run) as (_, address):
            yield run, address


def save_model(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


class FarSilo:
    """One silo's connection, through a proxy that can be near or far; bottom and top are left out."""

    def __init__(self, recipe: Recipe, name: str, address: str) -> None:
        self.name = name
        self.proxy = CountingProxy(address)
        hello = greeting(Checkpoint(recipe.model.path), recipe)
        channel = connect(recipe, name, "Trunk", self.proxy.address, hello)
        self._silo = BareSilo(channel, recipe.boundary, WIDTH)
        self._h_TD = torch.randn(sum(LENGTHS), WIDTH)

    def begin(self, round: int, participants: list[str]) -> None:
        self._silo.rounds.begin(round, participants)

    def step(self, round: int, number: int) -> None:
        """Three round trips: hidden states, gradients, and the optimizer step that waits for all."""
        self._silo.step(self._h_TD, LENGTHS)
        self._silo.rounds.commit(round, number, float(sum(LENGTHS)))

    def close(self) -> None:
        self._silo.close()
        self.proxy.close()


@contextmanager
def connected(recipe: Recipe, number: int, address: str) -> Iterator[FarSilo]:
    silo = FarSilo(recipe, f"silo{number}", address)
    yield silo
    silo.close()


class Rounds:
    """Blocks of steps by the first so many silos, each block a round of the trunk's."""

    def __init__(self, silos: list[FarSilo]) -> None:
        self._silos = silos
        self._round = 0

    def block(self, count: int, round_trip: float) -> Seconds:
        """Seconds of each step but the first, from when the first silo starts it until the last has its answer."""
        self._round += 1
        silos = self._silos[:count]
        for silo in silos:
            silo.proxy.hold(round_trip / 2)
        starts, ends = ([[0.0] * STEPS for _ in silos] for _ in range(2))
        threads = [
            threading.Thread(target=self._work, args=(silo, [one.name for one in silos], starts[place], ends[place]))
            for place, silo in enumerate(silos)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        spans = zip(zip(*starts, strict=True), zip(*ends, strict=True), strict=True)
        return [max(ended) - min(started) for started, ended in spans][1:]

    def _work(self, silo: FarSilo, participants: list[str], starts: Seconds, ends: Seconds) -> None:
        silo.begin(self._round, participants)
        for number in range(STEPS):
            starts[number] = time.perf_counter()
            silo.step(self._round, number + 1)
            ends[number] = time.perf_counter()


def report_times(results: Results, taken: dict[tuple[int, float], Seconds]) -> None:
    for (count, trip), seconds in taken.items():
        name = f"step of {count} silo{'s' if count > 1 else ''} at {trip * 1e3:.0f} ms"
        quartiles = statistics.quantiles(seconds, n=4)
        results.add(f"{name}, median of {len(seconds)}", quartiles[1] * 1e3, "ms")
        results.add(f"{name}, quartiles' distance", (quartiles[2] - quartiles[0]) * 1e3, "ms")
    middle = {kind: statistics.median(seconds) for kind, seconds in taken.items()}
    network = {count: middle[count, ROUND_TRIP] - middle[count, 0.0] for count in (1, SILOS)}
    for count, seconds in network.items():
        results.add(f"network time of a step, {count} silo{'s' if count > 1 else ''}", seconds * 1e3, "ms")
    ratio = network[SILOS] / network[1]
    results.add(f"network time of a step, {SILOS} silos / 1", ratio, "ratio", at_most=1.2)
    whole = middle[SILOS, ROUND_TRIP] / middle[1, ROUND_TRIP]
    results.add(f"whole step at {ROUND_TRIP * 1e3:.0f} ms, {SILOS} silos / 1", whole, "ratio")


def report_bytes(results: Results, silo: FarSilo) -> None:
    """Of one silo's step through the socket, beside the payload it holds each way."""
    before = silo.proxy.up, silo.proxy.down
    silo.begin(4 * BLOCKS + 1, [silo.name])
    for number in range(STEPS):
        silo.step(4 * BLOCKS + 1, number + 1)
    results.add("payload a step and silo, each way", 2 * sum(LENGTHS) * WIDTH * 4 / 1024, "KiB")
    results.add("bytes up a step and silo", (silo.proxy.up - before[0]) / STEPS / 1024, "KiB")
    results.add("bytes down a step and silo", (silo.proxy.down - before[1]) / STEPS / 1024, "KiB")


if __name__ == "__main__":
    main()
