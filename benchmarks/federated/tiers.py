"""Summing a thousand silos' updates in two tiers: edges take the masks off their cohorts' sums, the root adds those.

A part of ``make bench-federation``. All silos, edges and the root are in one process, every message takes the bytes it
has on the wire; each size runs in a process of its own. One silo in twenty goes after it dealt its shares.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.results import Results
from benchmarks.federated.sums import PARAMETERS, RANGE
from isthmus.federation.aggregator import aggregator_of
from isthmus.federation.collection import Collected
from isthmus.federation.planner import EdgePlanner, RootPlanner
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary
from isthmus.silo.cohort import Cohort
from isthmus.silo.update import MaskedUpdates
from isthmus.storage.record import RoleDirectory
from isthmus.updates.compression import Compression
from isthmus.updates.flat import Layout
from isthmus.updates.quantize import Integers, Ring, Whole
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.channel import Answer, LoopbackChannel

SIZES = (10, 100, 1000)
COHORT = 25
DROPPED = 0.05
ZEROS = {"x": torch.zeros(PARAMETERS)}


def measure(results: Results) -> None:
    for silos in SIZES:
        command = [sys.executable, "-m", "benchmarks.federated.tiers", str(silos)]
        done = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        name = f"{silos:,} silos × {PARAMETERS:,} parameters in two tiers, 5 % gone"
        results.add(f"{name}: numbers that differ from the plain integer sum", done["wrong"], "numbers", at_most=0)
        results.add(f"{name}: time", done["seconds"], "s")
        results.add(f"{name}: peak memory", done["memory"], "GB", at_most=24.0)
        results.add(f"{name}: bytes to the root", done["bytes"] / 1e6, "MB")


class Plain:
    """The numbers of all silos whose updates counted, added before any mask."""

    def __init__(self) -> None:
        self.total_P: Integers = np.zeros(PARAMETERS, np.int64)
        self._lock, self._encode = threading.Lock(), Ring.encode

    def encode(self, ring: Ring, values_P: Any, **how: Any) -> Whole:
        whole_P = self._encode(ring, values_P, **how)
        with self._lock:
            self.total_P += whole_P
        return whole_P


class Kept(RootPlanner):
    """The root's planner, which keeps what a round brought."""

    collected: Collected

    def conclude(self, round: int, collected: Collected) -> Answer:
        self.collected = collected
        return super().conclude(round, collected)


class Tree:
    """Aggregators and silos of one federation."""

    def __init__(self, silos: int, folder: Path) -> None:
        self.recipe = recipe(silos)
        authority = Authority()
        self._names = [silo.name for silo in self.recipe.silo]
        edges = [edge.name for edge in self.recipe.edge]
        identities = {name: authority.issue(name) for name in ("root", *edges, *self._names)}
        self.planner = Kept(self.recipe, ZEROS, RoleDirectory(folder))
        root = aggregator_of(self.recipe, "root", self.planner, identities["root"])
        self.ways = {name: LoopbackChannel(root, name) for name in edges}
        relays = {
            name: EdgePlanner(self.recipe, ZEROS, RoleDirectory(folder / name), way) for name, way in self.ways.items()
        }
        nodes = {name: aggregator_of(self.recipe, name, relay, identities[name]) for name, relay in relays.items()}
        self._channels = {name: LoopbackChannel(nodes[self.recipe.tree.parent(name)], name) for name in self._names}
        boundary, compression = Boundary(self.recipe.boundary), Compression(self.recipe.federation)
        self._updates = {
            name: MaskedUpdates(
                boundary,
                channel,
                identities[name],
                compression,
                Cohort.of(self.recipe.tree.node(self.recipe.tree.parent(name))),
            )
            for name, channel in self._channels.items()
        }
        draw = np.random.default_rng(0)
        self._gone = set(draw.choice(self._names, math.ceil(DROPPED * silos), replace=False).tolist())

    def round(self) -> None:
        plans: dict[str, pb.Plan] = {}
        for name in self._names:
            self._ask(name).add_done_callback(lambda done, name=name: plans.update({name: shortened(done)}))
        for edge in self.recipe.edge:  # one cohort after another: what all hold at a time would not fit into memory
            for name in edge.silos:
                self._updates[name].begin(plans[name], Layout({"x": (PARAMETERS,)}))
            with ThreadPoolExecutor(len(edge.silos)) as threads:
                for sent in [threads.submit(self._send, name, plans[name]) for name in edge.silos]:
                    sent.result()

    def _ask(self, name: str) -> Answer:
        return self._channels[name].submit(pb.Ready(keys=self._updates[name].offer()))

    def _send(self, name: str, plan: pb.Plan) -> None:
        if name in self._gone:  # a new process in its place
            self._ask(name)
            return
        draw = torch.Generator().manual_seed(int(name))
        change = {"x": 0.05 * torch.randn(PARAMETERS, generator=draw)}
        self._updates[name].send(self._updates[name].pack(plan, change, 1.0, 1.0))


def recipe(silos: int) -> Recipe:
    size = min(COHORT, silos // 2)
    names = [f"{number:04d}" for number in range(silos)]
    cohorts = [names[start : start + size] for start in range(0, silos, size)]
    return Recipe.of(
        {
            "model": {"path": "none"},
            "boundary": {path: {"noise": 0.0} for path in ("forward", "gradient", "update")},
            "federation": {"secure": {"masks": True, "range": RANGE}},
            "train": {"rounds": 1, "evaluate": False},
            "edge": [
                {"name": f"edge-{number}", "address": "none:1", "silos": cohort, "minimum": 3, "patience": 3600.0}
                for number, cohort in enumerate(cohorts)
            ],
            "root": {"patience": 3600.0},
            "silo": [{"name": name, "train": "none"} for name in names],
        }
    )


def shortened(done: Answer) -> pb.Plan:
    """A plan without the adapters, which each silo would hold on a machine of its own."""
    plan = done.result()
    assert isinstance(plan, pb.Plan)
    plan.ClearField("adapters")
    return plan


def main() -> None:
    plain = Plain()
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(int(sys.argv[1]), Path(folder))
        Ring.encode = lambda ring, values_P, **how: plain.encode(ring, values_P, **how)  # type: ignore[method-assign]
        started = time.perf_counter()
        tree.round()
        seconds = time.perf_counter() - started
    total_KS = tree.planner.collected.total_KS
    assert total_KS is not None
    found = {
        "wrong": int((total_KS[:PARAMETERS] != plain.total_P).sum()),
        "seconds": seconds,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "bytes": sum(way.sent_bytes for way in tree.ways.values()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
