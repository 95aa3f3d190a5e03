"""Summing adapter updates under masks: whole rounds through the silos' own code, beside Flower's SecAgg+ in this run.

A part of ``make bench-federation``. All parties are in one process on one core, and every message takes the bytes it
has on the wire. Flower's side (``flower_sums.py``) runs likewise, in an environment of its own: with the complete graph
that isthmus has, and for many silos with sparse graphs, whose work grows with the neighbours and not with the silos.
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from google.protobuf.message import Message

from benchmarks.common.results import Results
from isthmus.errors import IsthmusError
from isthmus.federation.collection import Collected, Done, MakeBarrier
from isthmus.federation.masked import Masked
from isthmus.recipe import BoundarySection, FederationSection, SecureSection
from isthmus.silo.boundary import Boundary
from isthmus.silo.cohort import Cohort
from isthmus.silo.update import MaskedUpdates
from isthmus.updates.compression import Compression
from isthmus.updates.flat import Layout
from isthmus.updates.graph import sparse_graph
from isthmus.updates.masking import Advert
from isthmus.updates.quantize import Ring
from isthmus.updates.sums import SumFormat
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.barrier import Barrier
from isthmus.wire.channel import Answer, LoopbackChannel
from isthmus.wire.identity import Identity
from isthmus.wire.sum_keys import plan_digest, signers, verify_keys

PARAMETERS = 460_800
"""Of a rank-8 adapter on all projections of SmolLM2-135M's two ends, about."""
FLOWER = Path("build/flower/bin/python")
RANGE = 0.5
SIXTEEN_BITS = 2 * PARAMETERS


@dataclass(frozen=True)
class Sum:
    """Costs of one summation."""

    seconds: float
    processor: float
    bytes: float
    """Sent by a silo, on average."""
    error: float
    """Of the mean: the largest of a parameter."""


@dataclass(frozen=True)
class Graph:
    """Which silos mask with which in Flower's SecAgg+."""

    name: str
    """As in rows of results."""
    shares: int
    """Of a silo's key: one for itself, one for each neighbour."""
    threshold: int
    """Shares that rebuild a key."""


def complete(silos: int) -> Graph:
    """Every silo is every other's neighbour, as in isthmus; two thirds of them rebuild a key."""
    return Graph("Flower's SecAgg+", silos, round(0.67 * silos))


def sparse(shares: int, threshold: int, comment: str = "") -> Graph:
    """Each silo masks with some others only, as SecAgg+ is meant to be used, beside isthmus with its complete graph."""
    return Graph(f"Flower's SecAgg+ with {shares} shares, threshold {threshold}{comment}", shares, threshold)


def as_safe(silos: int) -> Graph:
    """The sparsest graph that holds against as many colluders as isthmus does: less than a third of all silos."""
    degree, threshold = sparse_graph(silos)
    return sparse(degree + 1, threshold, ", against a third of colluders")


SPARSE = (sparse(17, 9), sparse(33, 18), as_safe(50))
FASTER, BYTES = 10.0, 1.73
"""Times as fast as Flower at least; times a 16-bit update's bytes at most."""


def measure(results: Results) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for silos, repeats, others in ((10, 5, ()), (50, 2, SPARSE)):
        graphs = (complete(silos), *others)
        runs = [(ours(silos), [flowers(silos, graph) for graph in graphs]) for _ in range(repeats)]
        name = f"sum of {silos} silos × {PARAMETERS:,} parameters"
        for number, when in enumerate(("in the first round", "in later rounds")):
            spent = statistics.median(own[number].processor for own, _ in runs)
            results.add(f"{name}: processor time, {when}", spent, "s")
        for place, graph in enumerate(graphs):
            beside(results, name, graph, [(own, theirs[place]) for own, theirs in runs])
        (_, own), _ = runs[-1]
        results.add(f"{name}: bytes a 16-bit update's", own.bytes / SIXTEEN_BITS, "×", at_most=BYTES)
        results.add(f"{name}: largest error of the mean", 1e6 * own.error, "millionths")


def beside(results: Results, name: str, graph: Graph, runs: Sequence[tuple[Sequence[Sum], Sum]]) -> None:
    """Flower's side and its ratio to ours, run by run: our two rounds beside its one."""
    for number, when in enumerate(("in the first round", "in later rounds")):
        faster = [flower.processor / own[number].processor for own, flower in runs]
        median = statistics.median(faster)
        results.add(f"{name}: faster than {graph.name} {when}, median", median, "×", at_least=FASTER)
        results.add(f"{name}: faster than {graph.name} {when}, least", min(faster), "×")
    spent = statistics.median(flower.processor for _, flower in runs)
    _, flower = runs[-1]
    results.add(f"{name}: processor time, {graph.name}", spent, "s")
    results.add(f"{name}: bytes a 16-bit update's, {graph.name}", flower.bytes / SIXTEEN_BITS, "×")
    results.add(f"{name}: largest error of the mean, {graph.name}", 1e6 * flower.error, "millionths")


class Root:
    """A round's collection as a service, checking signatures as the root does."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._lock = threading.RLock()
        self.keys: dict[str, pb.SumKeys] = {}
        self.collection: Masked | None = None

    def handle(self, peer: str, request: Message) -> Answer:
        if self.collection is not None:
            with self._lock:
                return self.collection.handle(peer, request)
        assert isinstance(request, pb.Ready)
        verify_keys(self._identity, peer, request.keys)
        self.keys[peer] = request.keys
        answer: Answer = Answer()
        answer.set_result(pb.Plan())
        return answer

    def begin(self, done: Done) -> bytes:
        """The plan as it crosses the wire, but for the adapters."""
        adverts = {name: Advert(one.sealing, one.masking, one.commitment) for name, one in self.keys.items()}
        layout, ring = Layout({"x": (PARAMETERS,)}), Ring(len(adverts), RANGE)
        sums = SumFormat(layout, ring)
        plan = pb.Plan(round=1, participants=sorted(adverts), sum=secrets.token_bytes(16))
        for name, keys in self.keys.items():
            plan.keys[name].CopyFrom(keys)
        context = plan_digest(plan)
        make: MakeBarrier = lambda fire: Barrier(600.0, fire)  # noqa: E731
        self.collection = Masked(adverts, sums, make, done, context=context, fewest=3, verify=self._verify)
        return plan.SerializeToString()

    def _verify(self, peer: str, signature: bytes, digest: bytes, living: pb.Survivors) -> None:
        assert signers(self._identity, self.keys, {peer: signature}, digest, living, enough=1)


def ours(silos: int) -> list[Sum]:
    """Two rounds of one federation, from the silos' keys to the mean. In the first, certificates are new to all."""
    authority, names = Authority(), [f"silo-{number}" for number in range(silos)]
    identities = {name: authority.issue(name) for name in (*names, "root")}
    draw = torch.Generator().manual_seed(0)
    changes = {name: {"x": 0.05 * torch.randn(PARAMETERS, generator=draw)} for name in names}
    root = Root(identities["root"])
    channels = {name: LoopbackChannel(root, name) for name in names}
    section = BoundarySection.model_validate({path: {"noise": 0.0} for path in ("forward", "gradient", "update")})
    exact = Compression(FederationSection(secure=SecureSection(masks=True, range=RANGE)))
    cohort = Cohort(frozenset(names), 3)
    updates = {
        name: MaskedUpdates(Boundary(section), channels[name], identities[name], exact, cohort) for name in names
    }
    return [summed(root, channels, updates, changes) for _ in range(2)]


def summed(
    root: Root,
    channels: Mapping[str, LoopbackChannel],
    updates: Mapping[str, MaskedUpdates],
    changes: Mapping[str, dict[str, torch.Tensor]],
) -> Sum:
    """One round."""
    found = list[Collected | IsthmusError]()
    sent = sum(channel.sent_bytes for channel in channels.values())

    with ThreadPoolExecutor(len(channels)) as threads:
        started, processor = time.perf_counter(), time.process_time()
        for name, channel in channels.items():
            channel.call(pb.Ready(keys=updates[name].offer()))
        data = root.begin(found.append)
        plans = {name: pb.Plan.FromString(data) for name in channels}
        for name in channels:
            updates[name].begin(plans[name], Layout.of(changes[name]))
        packed = {name: updates[name].pack(plans[name], changes[name], 1.0, 1.0) for name in channels}
        for done in [threads.submit(updates[name].send, update) for name, update in packed.items()]:
            done.result()  # each waits for the others
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
    (collected,) = found
    assert isinstance(collected, Collected)
    root.collection = None
    mean = torch.stack([change["x"] for change in changes.values()]).mean(0)
    error = float((collected.contributions[0].change["x"] - mean).abs().max())
    sent = sum(channel.sent_bytes for channel in channels.values()) - sent
    return Sum(seconds, processor, sent / len(channels), error)


def flowers(silos: int, graph: Graph) -> Sum:
    """The same by Flower's own code."""
    size = (silos, PARAMETERS, 0, graph.shares, graph.threshold)
    command = [
        str(FLOWER),
        "-P",
        "benchmarks/federated/flower_sums.py",
        *map(str, size),
    ]  # this folder's names are not its
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Sum(**json.loads(done.stdout))
