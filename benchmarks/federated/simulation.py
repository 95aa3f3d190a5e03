"""A federation in one process, to measure how well and how fast it learns: real silos, trunk, edges and root.

Each silo is a thread, and every message takes the bytes that it has on the wire.

Time is the threads' own processor time, so that other work on the machine does not count: *summed*, of the whole
federation, and *side by side*, as if each silo had a machine: at each barrier what the slowest silo took, and all that
trunk, edges and root did.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import Message

from isthmus.engines.certificates import make_certificates
from isthmus.federation.aggregator import edge_service, root_service
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT
from isthmus.silo.join import greeting
from isthmus.silo.update import AggregatorClient
from isthmus.silo.worker import Worker
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.updates.flat import Layout
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel, Service

Values = dict[str, Any]
Craft = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""From a malicious silo's own change (P), the honest ones' (H × P) and how many are malicious to what it sends (P)."""
PATIENCE = 1200.0


@dataclass(frozen=True)
class Times:
    """Seconds of one round."""

    side_by_side: float
    summed: float


@dataclass(frozen=True)
class Learned:
    """A federation that ran."""

    run: RunDirectory
    times: tuple[Times, ...]
    """By round."""
    update_bytes: float
    """Payload of one silo's update, on average."""

    def tensors(self, round: int) -> dict[str, torch.Tensor]:
        """The adapters after this round, by uncut name; those that rest are left out, but for the trunk's."""
        trunk, root = (self.run.role(role).load_round(round) for role in ("trunk", ROOT))
        return {**trunk["adapter"], **root["shared"]}

    def losses(self) -> list[float]:
        """Of each step of training, the mean over the silos that took it."""
        by_step: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
        for silo in self.run.recipe().silo:
            for line in read_journal(self.run.role(silo.name).path / "metrics.jsonl"):
                if line["event"] == "step":
                    by_step[line["round"], line["step"]].append(line["loss"])
        return [sum(by_step[step]) / len(by_step[step]) for step in sorted(by_step)]


def recipe_of(model: Path, silos: Mapping[str, Values], changes: Values, device: str = "cpu") -> Recipe:
    """A recipe without noise, of these silos' files and other keys, with these sections' keys changed.

    Args:
        device: of the trunk and of all silos.
    """
    values: Values = {
        "threads": 1,
        "model": {"path": str(model.resolve()), "bottom": 2, "top": 2},
        "boundary": {path: {"noise": 0.0} for path in ("forward", "gradient", "update")},
        "train": {"evaluate": False, "keep_rounds": 10_000},
        "trunk": {"patience": PATIENCE, "together": 32, "device": device},
        "root": {"patience": PATIENCE},
        "silo": [
            {
                "name": name,
                "device": device,
                **{key: str(one) if isinstance(one, Path) else one for key, one in own.items()},
            }
            for name, own in silos.items()
        ],
    }
    for section, value in changes.items():
        values[section] = merged(values.get(section, {}), value) if isinstance(value, dict) else value
    return Recipe.of(values)


def merged(values: Values, changes: Values) -> Values:
    """These values with the changed keys, section by section."""
    both = {
        key: merged(values[key], one) if isinstance(one, dict) else one for key, one in changes.items() if key in values
    }
    return {**values, **changes, **both}


def federate(recipe: Recipe, folder: Path, *, malicious: Collection[str] = (), craft: Craft | None = None) -> Learned:
    """Run a federation in this folder to its end.

    Args:
        malicious: silos that send what ``craft`` makes of the others' changes in place of their own.
    """
    if recipe.federation.secure.masks:
        certificates = folder / "certificates"
        make_certificates(recipe, certificates)
        recipe = recipe.model_copy(update={"wire": recipe.wire.model_copy(update={"certificates": str(certificates)})})
    run = RunDirectory.create(folder / "run", recipe)
    names = [silo.name for silo in recipe.silo]
    clock = Clock(len(names), synchronized=recipe.trunk.adapter == "shared")
    trunk = TrunkService(recipe, run.role("trunk"))
    trunk.restore(0)
    nodes = aggregators(recipe, run)
    collusion = Collusion(set(names) - set(malicious), malicious, craft) if craft else None

    def silo(name: str) -> float:
        try:
            return trained(name)
        except Exception:
            traceback.print_exc()  # now: the others wait for this one until their patience ends
            raise

    def trained(name: str) -> float:
        hello = greeting(Checkpoint(recipe.model.path), recipe.of_silo(name, ranked=False))
        ways = {
            "trunk": LoopbackChannel(Clocked(trunk, clock), name, greeting=hello),
            "root": LoopbackChannel(Clocked(nodes[recipe.tree.parent(name)], clock), name),
        }
        worker = Worker(recipe, name, run.role(name), **ways)
        if collusion:
            worker._aggregator = ColludingClient(worker._aggregator, collusion, name)  # type: ignore[assignment]
        worker.run()
        worker.close()
        return worker._silo.boundary.released_bytes["update"] / recipe.train.rounds

    with ThreadPoolExecutor(len(names)) as threads:
        sizes = list(threads.map(silo, names))
    trunk.stop()
    return Learned(run, clock.times(), sum(sizes) / len(sizes))


def aggregators(recipe: Recipe, run: RunDirectory) -> dict[str, Service]:
    """The root and all edges, by name; parents before their children."""
    nodes: dict[str, Service] = {ROOT: root_service(recipe, run.role(ROOT))}
    waiting = [edge.name for edge in recipe.edge]
    while waiting:
        name = waiting.pop(0)
        parent = recipe.tree.parent(name)
        if parent in nodes:
            nodes[name] = edge_service(recipe, name, run.edge(name), LoopbackChannel(nodes[parent], name))
        else:
            waiting.append(name)
    return nodes


class Clock:
    """Processor time of each silo's thread, and of the process, at each barrier.

    Args:
        silos: how many.
        synchronized: they wait for one another at each step, not only at the end of a round.
    """

    def __init__(self, silos: int, *, synchronized: bool) -> None:
        self._silos, self._synchronized = silos, synchronized
        self._lock = threading.Lock()
        self._marks: defaultdict[tuple[int, int], dict[str, float]] = defaultdict(dict)
        self._whole: dict[int, float] = {}

    def note(self, peer: str, request: Message) -> None:
        """A silo's thread is about to wait for the others."""
        if isinstance(request, pb.Ready):
            round, step = request.completed + 1, 0
        elif isinstance(request, pb.Commit) and self._synchronized:
            round, step = request.round, request.step
        elif isinstance(request, pb.Update):
            round, step = request.round, 2**31
        else:
            return
        with self._lock:
            self._marks[round, step][peer] = time.thread_time()
            if step == 0:
                self._whole[round] = time.process_time()

    def times(self) -> tuple[Times, ...]:
        """By round, from when all silos ask for its plan to when they ask for the next; none where some silos leave
        rounds out, since then nobody waits for all."""
        rounds = max(round for round, _ in self._marks) - 1
        if any(len(self._marks[round, 0]) < self._silos for round in range(1, rounds + 2)):
            return ()
        return tuple(self._times(round) for round in range(1, rounds + 1))

    def _times(self, round: int) -> Times:
        steps = [*sorted(mark for mark in self._marks if mark[0] == round), (round + 1, 0)]
        before, spans = dict(self._marks[steps[0]]), []
        for marks in (self._marks[step] for step in steps[1:]):
            spans.append([marks[peer] - before[peer] for peer in marks])
            before |= marks  # who takes fewer steps goes on from its last one
        summed = self._whole[round + 1] - self._whole[round]
        silos = sum(map(sum, spans))
        return Times(sum(map(max, spans)) + max(0.0, summed - silos), summed)


class Clocked:
    """A service whose callers' time is noted."""

    def __init__(self, service: Service, clock: Clock) -> None:
        self._service, self._clock = service, clock

    def handle(self, peer: str, request: Message) -> Answer:
        self._clock.note(peer, request)
        return self._service.handle(peer, request)


class Collusion:
    """Malicious silos that know all honest changes of a round before they send theirs.

    Args:
        honest: names of the honest silos.
        malicious: names of the others.
    """

    def __init__(self, honest: Collection[str], malicious: Collection[str], craft: Craft) -> None:
        self._honest, self._malicious, self._craft = set(honest), set(malicious), craft
        self._known: defaultdict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        self._told = threading.Condition()

    def sent(self, name: str, round: int, change_P: torch.Tensor) -> torch.Tensor:
        """The change that this silo sends, P. A malicious one waits until it knows all honest changes."""
        with self._told:
            if name not in self._malicious:
                self._known[round][name] = change_P
                self._told.notify_all()
                return change_P
            self._told.wait_for(lambda: self._known[round].keys() == self._honest, PATIENCE)
        honest_HP = torch.stack([self._known[round][one] for one in sorted(self._honest)])
        return self._craft(change_P.double(), honest_HP.double(), len(self._malicious)).float()


class ColludingClient:
    """An aggregator client whose updates pass through a collusion first."""

    def __init__(self, client: AggregatorClient, collusion: Collusion, name: str) -> None:
        self._client, self._collusion, self._name = client, collusion, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def pack(
        self, plan: pb.Plan, change: Mapping[str, torch.Tensor], weight: float, share: float, quality: float
    ) -> pb.Update:
        layout = Layout.of(change)
        sent_P = self._collusion.sent(self._name, plan.round, layout.row(change))
        return self._client.pack(plan, layout.tensors(sent_P), weight, share, quality)
