"""Edges between silos and root: every aggregator real, over loopback channels; silos are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf.message import Message

from isthmus.errors import FrameError, IsthmusError, ProtocolError, QuorumError, RecipeError, RoundLostError
from isthmus.federation.aggregator import aggregator_of
from isthmus.federation.collection import Collected
from isthmus.federation.planner import EdgePlanner, RootPlanner
from isthmus.federation.rounds import Aggregator
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary
from isthmus.silo.cohort import Cohort
from isthmus.silo.update import MaskedUpdates, OpenUpdates, Updates
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RoleDirectory
from isthmus.updates import quantize
from isthmus.updates.compression import Compression
from isthmus.updates.flat import Layout
from isthmus.updates.quantize import Ring
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.channel import Answer, LoopbackChannel
from tests.conftest import make_recipe

SHAPES = {"x": (20, 30), "y": (4,)}
LAYOUT = Layout(SHAPES)
ZEROS = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
RANGE, LONG, SOON, WAIT = 0.5, 600.0, 2.0, 60.0
NAMES = tuple("abcdefgh")
Edges = list[dict[str, Any]]
WARDS: Edges = [
    {"name": "left", "address": "localhost:1", "silos": list("abcd"), "minimum": 3},
    {"name": "right", "address": "localhost:2", "silos": list("efgh"), "minimum": 3},
]
DEEP = [*({**ward, "parent": "region"} for ward in WARDS), {"name": "region", "address": "localhost:3"}]
AUTHORITY = Authority()
IDENTITIES = {name: AUTHORITY.issue(name) for name in (*NAMES, "i", "root", "left", "right", "region")}


class Tapped:
    """A service that keeps what comes."""

    def __init__(self, service: Aggregator) -> None:
        self.service, self.seen = service, list[tuple[str, Message]]()

    def handle(self, peer: str, request: Message) -> Answer:
        kept = type(request)()
        kept.CopyFrom(request)
        self.seen.append((peer, kept))
        return self.service.handle(peer, request)


def _tiers(edges: Edges) -> int:
    """Of edges, between silos and root."""
    return 1 + any("parent" in edge for edge in edges)


class Tree:
    """A federation's aggregators, and silos that learn what ``changes`` says."""

    def __init__(
        self,
        folder: Path,
        edges: Edges,
        *,
        masks: bool = True,
        patience: float = LONG,
        silos: tuple[str, ...] = NAMES,
        masked_range: float = RANGE,
        **federation: Any,
    ) -> None:
        self.recipe: Recipe = make_recipe(
            Path("none"),
            silos=silos,
            edge=edges,  # each has a quarter of its parent's patience
            root={"minimum": len(edges) if federation.get("robust") else 1, "patience": patience * 4 ** _tiers(edges)},
            federation={"secure": {"masks": masks, "range": masked_range}, **federation},
            train={"rounds": 2, "evaluate": False},
        )
        self.folder = folder
        self.planner = RootPlanner(self.recipe, ZEROS, RoleDirectory(folder / "root"))
        self.nodes = {"root": Tapped(aggregator_of(self.recipe, "root", self.planner, IDENTITIES["root"]))}
        for edge in reversed(edges):
            self.start(edge["name"])
        draw = torch.Generator().manual_seed(0)
        self.changes = {
            name: {key: 0.1 * torch.randn(shape, generator=draw) for key, shape in SHAPES.items()} for name in silos
        }

    def start(self, edge: str) -> None:
        """This edge's process, or a new one in its place."""
        parent = LoopbackChannel(self.nodes[self.recipe.tree.parent(edge)], edge)
        relay = EdgePlanner(self.recipe, ZEROS, RoleDirectory(self.folder / edge), parent)
        self.nodes[edge] = Tapped(aggregator_of(self.recipe, edge, relay, IDENTITIES[edge]))

    def updates(self, name: str) -> tuple[Updates, LoopbackChannel]:
        channel = LoopbackChannel(self.nodes[self.recipe.tree.parent(name)], name)
        boundary, compression = Boundary(self.recipe.boundary), Compression(self.recipe.federation, self.recipe.seed)
        if self.recipe.federation.secure.masks:
            cohort = Cohort.of(self.recipe.tree.node(self.recipe.tree.parent(name)))
            return MaskedUpdates(boundary, channel, IDENTITIES[name], compression, cohort), channel
        return OpenUpdates(boundary, channel, compression), channel

    def work(self, name: str, drops: bool = False) -> list[Any]:
        """Be this silo until the end; its plans. One that drops has no part in the first round after its begin."""
        threading.current_thread().name = name
        updates, channel = self.updates(name)
        plans = []
        while True:
            plan = channel.call(pb.Ready(keys=updates.offer()))
            plans.append(plan)
            if not plan.round or (drops and plan.round == 2):
                return plans
            updates.begin(plan, Layout.of(self.changes[name]))
            if drops:
                return plans
            updates.send(updates.pack(plan, self.changes[name], 3.0, 1.0))

    def run(self, dropping: str = "") -> dict[str, list[Any]]:
        with ThreadPoolExecutor(len(self.changes)) as threads:
            working = {name: threads.submit(self.work, name, name in dropping) for name in self.changes}
            return {name: one.result(WAIT) for name, one in working.items()}

    def mean(self, names: str) -> dict[str, torch.Tensor]:
        return {key: torch.stack([self.changes[name][key] for name in names]).mean(0) for key in SHAPES}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[np.ndarray]]:
    """What each silo's numbers were before masks, by silo and round."""
    plain: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    encode = Ring.encode

    def kept(self: Ring, values_P: Any, **how: Any) -> Any:
        whole_P = encode(self, values_P, **how)
        plain[threading.current_thread().name].append(whole_P.astype(np.int64))
        return whole_P

    monkeypatch.setattr(Ring, "encode", kept)
    return plain


@pytest.fixture
def concluded(monkeypatch: pytest.MonkeyPatch) -> list[Collected]:
    """What each round brought to the root."""
    rounds: list[Collected] = []
    conclude = RootPlanner.conclude

    def kept(self: RootPlanner, round: int, collected: Collected) -> Answer:
        rounds.append(collected)
        return conclude(self, round, collected)

    monkeypatch.setattr(RootPlanner, "conclude", kept)
    return rounds


@pytest.mark.parametrize("edges", [WARDS, DEEP], ids=["two tiers", "three tiers"])
@pytest.mark.parametrize("dropping", ["", "b", "bh"])
def test_the_tiered_sum_is_the_plain_integer_sum(
    tmp_path: Path,
    edges: Edges,
    dropping: str,
    encoded: dict[str, list[np.ndarray]],
    concluded: list[Collected],
) -> None:
    tree = Tree(tmp_path, edges, patience=SOON if dropping else LONG)
    tree.run(dropping)
    living = [name for name in NAMES if name not in dropping]
    for number, collected in enumerate(concluded):
        assert collected.total_KS is not None
        assert np.array_equal(collected.total_KS[: LAYOUT.size], sum(encoded[name][number] for name in living))
        assert (collected.total_KS[LAYOUT.size :] == len(living) * Ring(1, RANGE).levels).all()
    assert len(concluded) == 2
    step = RANGE / Ring(len(NAMES), RANGE).levels
    for key, tensor in tree.mean("".join(living)).items():
        assert (tree.planner.shared[key] - 2 * tensor).abs().max() <= 2.2 * step


def test_a_sum_is_as_wide_as_its_own_silos_need_however_many_others_there_are(tmp_path: Path) -> None:
    tree = Tree(tmp_path, [{**DEEP[0], "silos": list("abc")}, {**DEEP[1], "silos": list("defgh")}, DEEP[2]])
    tree.run()
    sums = {
        peer: len(request.masked)
        for node in ("region", "root")
        for peer, request in tree.nodes[node].seen
        if isinstance(request, pb.Update)
    }
    rings = {"left": Ring(3, RANGE), "right": Ring(5, RANGE), "region": Ring(8, RANGE)}
    assert sums == {name: ring.words(LAYOUT.size + 1) * ring.width for name, ring in rings.items()}
    assert sums["left"] < sums["right"] <= sums["region"]


def test_above_edges_there_is_room_for_more_silos_than_one_sum_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, concluded: list[Collected]
) -> None:
    monkeypatch.setattr(quantize, "LONGEST", Ring(4, RANGE).digit)
    tree = Tree(tmp_path / "edges", WARDS)
    tree.run()
    assert [collected.weights for collected in concluded] == [{"left": 4.0, "right": 4.0}] * 2
    one = {"name": "left", "address": "localhost:1", "silos": [*NAMES], "minimum": 3}
    for edges in ([one], DEEP):
        with pytest.raises(RecipeError, match="put edges, or more of them, between the silos and the root"):
            Tree(tmp_path / "refused", edges)


@pytest.mark.parametrize("masks", [False, True])
def test_what_the_root_sees_are_sums_of_cohorts(tmp_path: Path, masks: bool, encoded: Any) -> None:
    tree = Tree(tmp_path, WARDS, masks=masks)
    plans = tree.run()
    seen = tree.nodes["root"].seen
    assert {(peer, type(request)) for peer, request in seen} == {
        (edge, kind) for edge in ("left", "right") for kind in (pb.Ready, pb.Update)
    }
    for peer, request in seen:
        if isinstance(request, pb.Ready):
            assert list(request.silos) == list("abcd" if peer == "left" else "efgh")
            assert not request.HasField("keys")
        elif masks:
            members = "abcd" if peer == "left" else "efgh"
            ring = Ring(len(members), RANGE)
            total_P = ring.unpack(ring.read(request.masked, LAYOUT.size + 1), LAYOUT.size + 1)
            assert np.array_equal(total_P[: LAYOUT.size], sum(encoded[name][request.round - 1] for name in members))
    for mine in plans.values():  # all train with the trunk together, wherever their updates go
        assert [list(plan.participants) for plan in mine] == [list(NAMES), list(NAMES), []]
    assert [line["weights"] for line in read_journal(tmp_path / "left/metrics.jsonl")] == [
        dict.fromkeys("abcd", 1.0 if masks else 3.0)
    ] * 2


def test_open_tiers_learn_the_mean_of_all(tmp_path: Path) -> None:
    tree = Tree(tmp_path, [{**WARDS[0], "silos": list("abc")}, {**WARDS[1], "silos": list("defgh")}], masks=False)
    tree.run()
    for key, tensor in tree.mean("abcdefgh").items():
        torch.testing.assert_close(tree.planner.shared[key], 2 * tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "less", [{"compression": {"kind": "random-k", "keep": 0.5}}, {"compression": {"bits": 4}}, {"lora": "alternating"}]
)
def test_what_silos_send_less_of_passes_edges_exactly(
    tmp_path: Path, less: dict[str, Any], encoded: dict[str, list[np.ndarray]], concluded: list[Collected]
) -> None:
    Tree(tmp_path, WARDS, **less).run()
    for number, collected in enumerate(concluded):
        assert collected.total_KS is not None
        total = sum(encoded[name][number] for name in NAMES)
        assert np.array_equal(collected.total_KS[: len(total)], total)


@pytest.mark.parametrize(("rule", "borne"), [("mean", False), ("median", True)])
def test_under_masks_the_root_compares_cohorts(tmp_path: Path, rule: str, borne: bool) -> None:
    """One malicious silo spoils its own cohort's sum, and no more."""
    edges = [
        {"name": name, "address": "localhost:1", "silos": list(silos)}
        for name, silos in (("left", "abc"), ("right", "def"), ("region", "ghi"))
    ]
    tree = Tree(tmp_path, edges, silos=(*NAMES, "i"), robust=rule)
    for name, change in tree.changes.items():
        for tensor in change.values():
            tensor.fill_(-0.5 if name == "e" else 0.1)
    tree.run()
    found = max(float((tensor - 0.2).abs().max()) for tensor in tree.planner.shared.values())
    assert (found < 1e-3) == borne


def begun(tree: Tree) -> tuple[dict[str, Updates], dict[str, Any], dict[str, LoopbackChannel]]:
    """All silos with their plans of the first round."""
    joined = {name: tree.updates(name) for name in NAMES}
    asked = {name: channel.submit(pb.Ready(keys=own.offer())) for name, (own, channel) in joined.items()}
    plans = {name: answer.result(WAIT) for name, answer in asked.items()}
    return {name: own for name, (own, _) in joined.items()}, plans, {name: way for name, (_, way) in joined.items()}


def test_an_edge_that_starts_again_asks_as_a_silo_would(tmp_path: Path) -> None:
    """The round goes on without its cohort, which is there again in the next."""
    tree = Tree(tmp_path, WARDS, masks=False)
    updates, plans, _ = begun(tree)
    tree.start("left")
    again = {name: tree.updates(name) for name in "abcd"}
    again["a"][0].begin(plans["a"], Layout.of(tree.changes["a"]))
    packed = again["a"][0].pack(plans["a"], tree.changes["a"], 3.0, 1.0)
    with pytest.raises(RoundLostError):
        again["a"][0].send(packed)
    asked = [channel.submit(pb.Ready()) for _, channel in again.values()]
    for name in "efgh":
        updates[name].begin(plans[name], Layout.of(tree.changes[name]))
        updates[name].send(updates[name].pack(plans[name], tree.changes[name], 3.0, 1.0))
    ready = [LoopbackChannel(tree.nodes["right"], name).submit(pb.Ready()) for name in "efgh"]
    for answer in (*asked, *ready):
        plan: Any = answer.result(WAIT)
        assert (plan.round, plan.completed, list(plan.participants)) == (2, 1, list(NAMES))
    for key, tensor in tree.mean("efgh").items():
        torch.testing.assert_close(tree.planner.shared[key], tensor, rtol=1e-6, atol=1e-7)


def test_silos_of_a_cohort_that_was_too_small_may_come_again_and_the_rest_goes_on(tmp_path: Path) -> None:
    tree = Tree(tmp_path, WARDS, patience=SOON)
    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(tree.work, name) for name in "efgh"]
        few = [threads.submit(tree.work, name) for name in "ab"]
        for one in few:
            with pytest.raises(QuorumError, match="2 silos are left, the recipe needs 3"):
                one.result(WAIT)
        for one in others:
            assert [plan.round for plan in one.result(WAIT)] == [1, 2, 0]
        back = [threads.submit(tree.work, name) for name in "abcd"]  # late, but the edge still answers
        for one in back:
            assert [plan.round for plan in one.result(WAIT)] == [0]
    for key, tensor in tree.mean("efgh").items():
        assert (tree.planner.shared[key] - 2 * tensor).abs().max() < 1e-3


def beyond(update: pb.Update) -> None:
    ring = Ring(4, RANGE)
    total_P = ring.unpack(ring.read(update.masked, LAYOUT.size + 1), LAYOUT.size + 1)
    total_P[3] = 4 * ring.levels + 1
    update.masked = ring.written(ring.pack(total_P))


def naked(update: pb.Update) -> None:
    update.masked = b""


@pytest.mark.parametrize(
    ("lie", "error"),
    [
        (beyond, FrameError),
        (naked, ProtocolError),
        (lambda update: setattr(update, "masked", update.masked[:-1]), FrameError),
        (lambda update: setattr(update, "silos", 1), FrameError),
    ],
    ids=["beyond", "naked", "short", "fewer"],
)
def test_a_sum_that_cannot_be_is_refused_and_the_rest_goes_on(
    tmp_path: Path, lie: Callable[[pb.Update], None], error: type[IsthmusError]
) -> None:
    tree = Tree(tmp_path, WARDS, patience=SOON)
    root, refused = tree.nodes["root"], list[IsthmusError]()
    honest = root.handle

    def lied(peer: str, request: Message) -> Answer:
        if peer == "right" or not isinstance(request, pb.Update):
            return honest(peer, request)
        lie(request)
        try:
            return honest(peer, request)
        except IsthmusError as complaint:
            refused.append(complaint)
            raise

    root.handle = lied  # type: ignore[method-assign]
    with ThreadPoolExecutor(8) as threads:
        working = {name: threads.submit(tree.work, name) for name in NAMES}
        for name in "abcd":
            with pytest.raises(error):
                working[name].result(WAIT)
        for name in "efgh":
            assert [plan.round for plan in working[name].result(WAIT)] == [1, 2, 0]
    assert isinstance(refused[0], error)
    for key, tensor in tree.mean("efgh").items():
        assert (tree.planner.shared[key] - 2 * tensor).abs().max() < 1e-3
