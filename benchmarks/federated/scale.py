"""Rounds of 10 to 1,024 silos through edges of 32 and a root: time, bytes, memory and processor time at each node.

``make bench-scale``. One process has the root, one all edges; silos, each with its own certificate, connection over
mTLS, keys and masks, are threads of processes of 128. Silos compute no model: their changes are random, as large as
those of SmolLM2's ends at cut (2, 2). What a tier costs is its processor time divided by its nodes; the wall time is of
two cores that all nodes share. The first round, in which everyone connects, is left out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Self

import numpy as np
import psutil
import torch

from benchmarks.common.ports import free_ports
from benchmarks.common.results import Results
from isthmus.demo.assets import smollm2
from isthmus.engines.certificates import make_certificates
from isthmus.engines.lifetime import Stopped, stoppable
from isthmus.engines.roles import start_edge, start_server
from isthmus.federation.aggregator import shared_tensors
from isthmus.model import adapters
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT
from isthmus.silo.boundary import Boundary
from isthmus.silo.update import AggregatorClient
from isthmus.storage.record import RunDirectory
from isthmus.updates.flat import Layout
from isthmus.wire.server import Server

CACHE = Path("build/demo")
SIZES = (10, 32, 128, 512, 1024)
COHORT = 32
CROWD = 128
"""Silos of one process: its threads take turns."""
ROUNDS = 11
FLAT = 1.1
"""A cost a silo that is this many times the smallest federation's, or less, is flat."""
FAR = 100_000
READY = "ready"
PATIENCE = 3600.0
Figures = dict[str, float]


def main() -> None:
    note({silos: measured(silos) for silos in SIZES})


def note(found: dict[int, Figures]) -> None:
    """Write what was found of federations by their numbers of silos, how it grows, and where that would lead."""
    results = Results("scale", "make bench-scale")
    for silos, figures in found.items():
        for measure, value in figures.items():
            name, _, unit = measure.rpartition(", ")
            results.add(f"{silos:,} silos: {name}", value, unit)
    for measure in filter(extrapolable, found[SIZES[-1]]):
        name, _, unit = measure.rpartition(", ")
        fixed, each = fitted([(silos, one[measure]) for silos, one in found.items() if silos >= COHORT])
        results.add(f"growth: {name}, for each 1,000 silos", 1000 * each, unit)
        results.add(f"{FAR:,} silos, extrapolated: {name}", fixed + each * FAR, unit)
    for cost in ("processor time", "bytes in", "bytes out"):
        measure = next(one for one in found[COHORT] if one.startswith(f"root: {cost}"))
        each = [found[silos][measure] / silos for silos in SIZES if silos >= COHORT]
        name = f"root: {cost} a silo, 1,024 silos against 32, edges of 32"
        results.add(name, each[-1] / each[0], "ratio", at_most=FLAT)
    print(f"written: {results.write()}")


def extrapolable(measure: str) -> bool:
    """Whether a figure is that of one node. The time of edges and silos is not: many share a process and its lock."""
    return measure.startswith(("root", "reading")) or "bytes" in measure


def fitted(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """What is fixed, and what each silo adds: least squares of the differences in proportion to the values."""
    silos, values = np.array([one for one, _ in points], float), np.array([value for _, value in points])
    each, fixed = np.polyfit(silos, values, 1, w=1 / values.clip(1e-9))
    return float(fixed), float(each)


def recipe_of(silos: int, folder: Path) -> Recipe:
    names = [f"{number:04d}" for number in range(silos)]
    cohorts = [names[start : start + COHORT] for start in range(0, silos, COHORT)]
    ports = free_ports(1 + len(cohorts))
    return Recipe.of(
        {
            "patience": PATIENCE,
            "threads": 1,
            "model": {"path": str(smollm2(CACHE).resolve()), "bottom": 2, "top": 2},
            "boundary": {path: {"noise": 0.0} for path in ("forward", "gradient", "update")},
            "federation": {"secure": {"masks": True}},
            "train": {"rounds": ROUNDS, "evaluate": False},
            "wire": {"certificates": str(folder / "certificates")},
            "trunk": {"address": f"localhost:{ports[0]}"},
            "root": {"address": f"localhost:{ports[0]}"},
            "edge": [
                {"name": f"edge-{number}", "address": f"localhost:{port}", "silos": cohort}
                for number, (port, cohort) in enumerate(zip(ports[1:], cohorts, strict=True))
            ],
            "silo": [{"name": name, "train": "none"} for name in names],
        }
    )


def measured(silos: int) -> Figures:
    """What a round of so many silos costs at each node, without the first."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as started:
        folder = Path(temporary)
        run = RunDirectory.create(folder / "run", recipe_of(silos, folder))
        before = time.perf_counter()
        recipe = run.recipe()
        reading = time.perf_counter() - before
        make_certificates(recipe, Path(recipe.wire.certificates))
        tiers = {tier: [started.enter_context(Process(tier, run))] for tier in ("root", "edges")}
        crowds = range(0, silos, CROWD)
        tiers["silos"] = [started.enter_context(Process("silos", run, str(start))) for start in crowds]
        times, costs = [], []
        for _ in range(ROUNDS):
            for crowd in tiers["silos"]:
                crowd.read("round")
            times.append(time.perf_counter())
            costs.append({tier: sum(one.used() for one in processes) for tier, processes in tiers.items()})
        ended = {tier: summed([one.end() for one in processes]) for tier, processes in reversed(tiers.items())}
    nodes = {"root": 1, "edges": len(recipe.edge), "silos": silos}
    lasted = median(after - before for before, after in pairwise(times))
    figures: Figures = {"reading the recipe, s": reading, "a round, s": lasted}
    for tier, count in nodes.items():
        one = tier.removesuffix("s")
        used = costs[-1][tier] - costs[0][tier]
        figures[f"{one}: processor time of a round, ms"] = 1e3 * used / (ROUNDS - 1) / count
        for way in ("in", "out"):
            figures[f"{one}: bytes {way} of a round, MB"] = ended[tier][way] / ROUNDS / count / 1e6
        figures[f"{'root' if tier == 'root' else f'all {tier}'}: memory, MB"] = ended[tier]["memory"] / 1e6
    return figures


def summed(figures: Sequence[Figures]) -> Figures:
    return {key: sum(one[key] for one in figures) for key in figures[0]}


class Process:
    """A process of a tier; it ends with the block."""

    def __init__(self, name: str, run: RunDirectory, *crowd: str) -> None:
        command = [sys.executable, "-m", "benchmarks.federated.scale", name, str(run.path), *crowd]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self._process, self._name = psutil.Process(self._started.pid), name
        if name != "silos":
            self.read(READY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._started.kill()
        self._started.wait()

    def used(self) -> float:
        """Processor seconds so far."""
        used = self._process.cpu_times()
        return used.user + used.system

    def end(self) -> Figures:
        """What the process says at its end, to which servers are asked."""
        if self._name != "silos":
            self._process.send_signal(signal.SIGTERM)
        assert self._started.stdout is not None
        found: Figures = json.loads(self._started.stdout.readline())
        return found

    def read(self, word: str) -> None:
        assert self._started.stdout is not None
        line = self._started.stdout.readline().strip()
        if line != word:
            raise RuntimeError(f"{self._name}: expected {word!r}, got {line!r}")


def serve_root(run: RunDirectory) -> list[Server]:
    return [start_server(run.recipe(), run, ("root",))[0]]


def serve_edges(run: RunDirectory) -> list[Server]:
    recipe = run.recipe()
    return [start_edge(recipe, run, edge.name)[0] for edge in recipe.edge]


def tell(servers: Sequence[Server]) -> None:
    """Serve until the driver asks for the end, then say what went in and out."""
    with suppress(Stopped), stoppable():
        print(READY, flush=True)
        threading.Event().wait()
    traffic = [one for server in servers for one in server.traffic()]
    say({"in": sum(one.received_bytes for one in traffic), "out": sum(one.sent_bytes for one in traffic)})


def say(found: Figures) -> None:
    print(json.dumps({**found, "memory": psutil.Process().memory_info().rss}), flush=True)


def train(run: RunDirectory, start: int) -> None:
    """A crowd of silos from this number on, each in a thread; a line a round."""
    recipe = run.recipe()
    names = [silo.name for silo in recipe.silo][start : start + CROWD]
    shared = shared_tensors(recipe)
    barrier = threading.Barrier(len(names), lambda: print("round", flush=True))
    with ThreadPoolExecutor(len(names)) as threads:
        clients = list(threads.map(lambda name: AggregatorClient(recipe, name, Boundary(recipe.boundary)), names))
        for done in [
            threads.submit(work, recipe, name, client, shared, barrier.wait)
            for name, client in zip(names, clients, strict=True)
        ]:
            done.result()
    channels = [client._channel for client in clients]
    say({"in": sum(one.received_bytes for one in channels), "out": sum(one.sent_bytes for one in channels)})


def work(
    recipe: Recipe,
    name: str,
    client: AggregatorClient,
    shared: dict[str, torch.Tensor],
    finished: Callable[[], object],
) -> None:
    """One silo's rounds, without a model: its changes are random."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(int(name))
    for completed in range(ROUNDS):
        plan = client.ask(completed)
        factors = adapters.trained_factors(recipe.federation.lora, plan.round)
        trained = adapters.select_factors(shared, factors)
        client.begin(plan, Layout.of(trained))
        change = {key: 0.01 * torch.randn(one.shape, generator=draw) for key, one in trained.items()}
        client.send(client.pack(plan, change, 1.0, 1.0, 0.0))
        finished()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        directory = RunDirectory(Path(sys.argv[2]))
        if sys.argv[1] == "silos":
            train(directory, int(sys.argv[3]))
        else:
            tell((serve_root if sys.argv[1] == ROOT else serve_edges)(directory))
