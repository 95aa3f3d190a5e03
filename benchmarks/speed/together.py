"""Four silos' training steps: computed one after another, in one pass of a shared adapter, in one pass of replicas.

``make bench-together``. Each way has a trunk process of its own; silos send prepared hidden states and gradients, so
that what is timed is the trunk and the wire. The same total work in each way, in turn.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.bare import BareSilo
from benchmarks.common.results import Results
from benchmarks.speed.foundation import bench_recipe
from benchmarks.speed.sessions import at_once, silos_recipe
from isthmus.demo.assets import smollm2
from isthmus.engines.local import at_address, local_recipe, serving
from isthmus.model.checkpoint import Checkpoint
from isthmus.silo.join import connect, greeting
from isthmus.storage.record import RunDirectory

CACHE = Path("build/demo")
SILOS = ("north", "east", "south", "west")
WAYS: dict[str, dict[str, Any]] = {
    "sequential": {"together": 1},
    "shared": {"adapter": "shared"},
    "replica": {"adapter": "replica", "average_every": 4},
}
SHAPES = {"2 × 128": [128, 128], "4 × 32": [32] * 4, "4 of 16 to 96": [16, 40, 72, 96]}
STEPS, WIDTH = 9, 576


def main() -> None:
    results = Results("together", "make bench-together")
    torch.set_num_threads(1)
    with ExitStack() as stack:
        ways = {name: stack.enter_context(federation(section)) for name, section in WAYS.items()}
        for shape, lengths in SHAPES.items():
            times = [{name: way.step(lengths) for name, way in ways.items()} for _ in range(STEPS)][1:]
            for name in WAYS:
                results.add(f"{shape}, {name}: step of 4 silos", statistics.median(one[name] for one in times), "s")
            report(results, shape, times)
    print(f"written: {results.write()}")


def report(results: Results, shape: str, times: list[dict[str, float]]) -> None:
    """Speed of a step in each way, relative to one silo after another."""
    for name in ("shared", "replica"):
        ratios = [one["sequential"] / one[name] for one in times]
        results.add(f"{shape}, {name}: speed against sequential", statistics.median(ratios), "ratio", at_least=1.0)
        results.add(f"{shape}, {name}: lowest step", min(ratios), "ratio")
        results.add(f"{shape}, {name}: highest step", max(ratios), "ratio")


class Federation:
    """Silos that take optimizer steps at once."""

    def __init__(self, silos: dict[str, BareSilo], width: int) -> None:
        self._silos = list(silos.values())
        self._width = width
        self._number = 0
        at_once(lambda number: self._silos[number].rounds.begin(1, list(silos)), len(silos))

    def step(self, lengths: list[int]) -> float:
        """Seconds until all have taken one step with sequences of these lengths."""
        self._number += 1
        h_TD = torch.randn(len(self._silos), sum(lengths), self._width)
        return at_once(lambda number: self._take(number, h_TD[number], lengths), len(self._silos))

    def _take(self, number: int, h_TD: torch.Tensor, lengths: list[int]) -> None:
        self._silos[number].step(h_TD, lengths)
        self._silos[number].rounds.commit(1, self._number, float(sum(lengths)))


@contextmanager
def federation(section: dict[str, Any]) -> Iterator[Federation]:
    """A trunk process with these settings, and its silos."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        path = Path(temporary) / "run"
        recipe = silos_recipe(bench_recipe(smollm2(CACHE)), SILOS)
        recipe = recipe.model_copy(update={"trunk": recipe.trunk.model_copy(update=section)})
        run = RunDirectory.create(path, local_recipe(recipe, path))
        _, address = stack.enter_context(serving(run))
        moved = at_address(run.recipe(), address)
        hello = greeting(Checkpoint(recipe.model.path), recipe)
        silos = {}
        for name in SILOS:
            channel = connect(moved, name, "Trunk", address, hello)
            silos[name] = stack.enter_context(closing(BareSilo(channel, recipe.boundary, WIDTH)))
        yield Federation(silos, WIDTH)


if __name__ == "__main__":
    main()
