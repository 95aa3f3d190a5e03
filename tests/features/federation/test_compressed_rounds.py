"""Rounds whose updates are compressed, played by the silos' own code over loopback: open and under masks the root comes
to what it would have come to, in the bytes that were asked for.

Shapes: P parameters, K numbers that cross.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import FrameError, IsthmusError, ProtocolError
from isthmus.federation.planner import RootPlanner
from isthmus.federation.rounds import Rounds
from isthmus.silo.boundary import Boundary
from isthmus.silo.update import OpenUpdates
from isthmus.storage.record import RoleDirectory
from isthmus.updates.compression import Compression
from isthmus.updates.flat import Layout
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel
from tests.conftest import make_recipe
from tests.features.federation.test_masked_rounds import COUNT, NAMES, SHAPES, WAIT, Federation

KEEP = 0.1
K = round(KEEP * COUNT)
OPEN = [("none", 8), ("none", 4), ("top-k", 8), ("random-k", 8), ("sketch", 4), ("sketch", 32)]
MASKED = [("none", 4), ("random-k", 4), ("random-k", 16), ("sketch", 4), ("sketch", 8)]


class Service:
    """The root's rounds behind a channel."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds

    def handle(self, peer: str, request: Any) -> Answer:
        return (
            self._rounds.ready(peer, request)
            if isinstance(request, pb.Ready)
            else self._rounds.contribute(peer, request)
        )


class Party:
    """Two silos and the root; each round both learn what ``changes`` says."""

    def __init__(self, store: RoleDirectory, rounds: int = 1, noise: float = 0.0, **compression: Any) -> None:
        self.recipe = make_recipe(
            Path("none"),
            silos=("a", "b"),
            federation={"compression": {"keep": KEEP, **compression}},
            boundary={"update": {"noise": noise}},
            train={"rounds": rounds, "evaluate": False},
        )
        self.planner = RootPlanner(self.recipe, {name: torch.zeros(shape) for name, shape in SHAPES.items()}, store)
        self.rounds = Rounds(self.recipe, self.planner)
        draw = torch.Generator().manual_seed(0)
        self.changes = {
            name: {key: torch.randn(shape, generator=draw) for key, shape in SHAPES.items()} for name in ("a", "b")
        }
        self.channels = {name: LoopbackChannel(Service(self.rounds), name) for name in ("a", "b")}
        self.boundaries = {name: Boundary(self.recipe.boundary) for name in ("a", "b")}
        self.updates = {
            name: OpenUpdates(self.boundaries[name], channel, Compression(self.recipe.federation, self.recipe.seed))
            for name, channel in self.channels.items()
        }

    def plans(self) -> dict[str, Any]:
        answers = {name: channel.submit(pb.Ready()) for name, channel in self.channels.items()}
        return {name: answer.result(WAIT) for name, answer in answers.items()}

    def play(self, weights: dict[str, float]) -> list[pb.Update]:
        """A round."""
        packed = []
        for name, plan in self.plans().items():
            self.updates[name].begin(plan, Layout.of(self.changes[name]))
            packed.append(self.updates[name].pack(plan, self.changes[name], weights[name], 1.0))
            self.updates[name].send(packed[-1])
        return packed


@pytest.fixture
def store(tmp_path: Path) -> RoleDirectory:
    return RoleDirectory(tmp_path)


@pytest.mark.parametrize(("name", "bits"), OPEN)
def test_open_updates_arrive_in_the_end(store: RoleDirectory, name: str, bits: int) -> None:
    rounds = 40
    party = Party(store, rounds, kind=name, bits=bits)
    for _ in range(rounds):
        packed = party.play({"a": 3.0, "b": 1.0})
        assert not any(update.tensors or update.masked for update in packed)
    for key, shared in party.planner.shared.items():
        expected = rounds * (0.75 * party.changes["a"][key] + 0.25 * party.changes["b"][key])
        assert (shared - expected).norm() < 0.4 * expected.norm()
    party.plans()


def test_bytes_are_noted_as_they_cross(store: RoleDirectory) -> None:
    party = Party(store, kind="random-k", bits=32)
    before = party.channels["a"].sent_bytes
    (update, _) = party.play({"a": 3.0, "b": 1.0})
    assert party.boundaries["a"].released_bytes["update"] == len(update.compressed) == 4 * K
    assert 4 * K < party.channels["a"].sent_bytes - before < 4 * K + 50


def test_a_silo_that_learned_nothing_sends_nothing_of_what_waits(store: RoleDirectory) -> None:
    party = Party(store, rounds=3, kind="random-k", bits=32)
    party.play({"a": 1.0, "b": 1.0})
    waits = party.updates["b"].state_dict()["x y"]
    shared = party.planner.shared
    packed = party.play({"a": 0.0, "b": 0.0})
    assert not any(update.compressed for update in packed)
    assert party.updates["b"].state_dict()["x y"] is waits
    assert all(torch.equal(tensor, shared[key]) for key, tensor in party.planner.shared.items())


def test_what_waits_is_what_the_boundary_secured(store: RoleDirectory) -> None:
    """Of a change that is zero, only noise crosses, and only noise of the same draw waits: no clean number does."""
    party = Party(store, noise=0.5, kind="random-k", bits=32)
    party.changes["a"] = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    (update, _) = party.play({"a": 1.0, "b": 1.0})
    rest_P = party.updates["a"].state_dict()["x y"]
    assert int((rest_P == 0).sum()) == K
    assert rest_P[rest_P != 0].std() == pytest.approx(0.5, rel=0.15)
    assert torch.frombuffer(bytearray(update.compressed), dtype=torch.float32).std() == pytest.approx(0.5, rel=0.4)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (pb.Update(round=1, weight=1.0), FrameError),
        (pb.Update(round=1, weight=1.0, compressed=bytes(4 * K + 1)), FrameError),
        (pb.Update(round=1, weight=1.0, compressed=b"\xff" * 4 * K), FrameError),
        (pb.Update(round=1, learned=True, masked=b"m"), ProtocolError),
        (
            pb.Update(round=1, weight=1.0, tensors=codec.encode_named({k: torch.ones(s) for k, s in SHAPES.items()})),
            FrameError,
        ),
    ],
)
def test_a_malformed_update_is_refused_and_changes_nothing(
    store: RoleDirectory, wrong: pb.Update, error: type[IsthmusError]
) -> None:
    party = Party(store, kind="random-k", bits=32)
    plans = party.plans()
    with pytest.raises(error) as refused:
        party.channels["b"].call(wrong)
    assert refused.value.remedy
    for name, plan in plans.items():
        party.updates[name].begin(plan, Layout.of(party.changes[name]))
        party.updates[name].send(party.updates[name].pack(plan, party.changes[name], 1.0, 1.0))
    assert party.plans()["a"].completed == 1


def test_a_compressed_update_where_none_is_due_is_refused(store: RoleDirectory) -> None:
    party = Party(store)
    party.plans()
    with pytest.raises(FrameError, match="is missing"):
        party.channels["b"].call(pb.Update(round=1, weight=1.0, compressed=bytes(4 * K)))


# --- under masks


def smaller(kind: str, bits: int) -> dict[str, Any]:
    return {"compression": {"kind": kind, "bits": bits, "keep": KEEP}}


@pytest.mark.parametrize(("name", "bits"), MASKED)
def test_masked_updates_arrive_in_the_end(store: RoleDirectory, name: str, bits: int) -> None:
    rounds = 30
    federation = Federation(
        store, rounds=rounds, federation=smaller(name, bits) | {"secure": {"masks": True, "range": 4.0}}
    )
    for _ in range(rounds):
        assert federation.finish(federation.begin()) == dict.fromkeys(NAMES)
    for key, expected in federation.mean(dict.fromkeys(NAMES, 1.0)).items():
        shared = federation.root.planner.shared[key] / rounds
        assert (shared - expected).norm() < 0.45 * expected.norm()
    assert federation.plans()["a"].round == 0


def test_a_masked_number_of_few_bits_takes_less_than_a_byte(store: RoleDirectory) -> None:
    federation = Federation(store, federation=smaller("random-k", 4))
    federation.finish(federation.begin())
    sizes = {len(request.masked) for _, request in federation.root.seen if isinstance(request, pb.Update)}
    assert sizes == {8 * math.ceil((K + 5) / 10)}  # ten to a word; a share has five digits of three bits
    assert federation.silos["a"].boundary.released_bytes["update"] == sizes.pop()


def test_a_masked_silo_weighs_by_its_share_and_sends_none_of_what_waits_if_it_learned_nothing(
    store: RoleDirectory,
) -> None:
    federation = Federation(store, federation=smaller("random-k", 16))
    shares = {"a": 1.0, "b": 0.5, "c": 0.25, "d": 1.0}
    federation.finish(federation.begin(), share=shares)
    waits = federation.silos["d"].updates.state_dict()["x y"]
    before = {key: tensor.clone() for key, tensor in federation.root.planner.shared.items()}
    for silo in "abc":
        federation.silos[silo].updates.load_state_dict({})
    federation.finish(federation.begin(), share=shares, weight=dict.fromkeys(NAMES, 1.0) | {"d": 0.0})
    assert federation.silos["d"].updates.state_dict()["x y"] is waits
    mean = federation.mean({name: share for name, share in shares.items() if name != "d"})
    crossed = {key: federation.root.planner.shared[key] - before[key] for key in SHAPES}
    assert sum(int(tensor.count_nonzero()) for tensor in crossed.values()) <= K
    for key, change in crossed.items():
        there = change != 0
        torch.testing.assert_close(change[there], mean[key][there], atol=1e-3, rtol=1e-3)


def test_what_the_ring_clips_crosses_later(store: RoleDirectory) -> None:
    federation = Federation(
        store, rounds=8, federation={"compression": {"bits": 8}, "secure": {"masks": True, "range": 0.05}}
    )
    federation.changes = {name: {key: torch.zeros(shape) for key, shape in SHAPES.items()} for name in NAMES}
    for name in NAMES:
        federation.changes[name]["y"][0] = 0.2
    federation.finish(federation.begin())
    assert float(federation.root.planner.shared["y"][0]) == pytest.approx(0.05, abs=1e-6)
    federation.changes = {name: {key: torch.zeros(shape) for key, shape in SHAPES.items()} for name in NAMES}
    for _ in range(4):
        federation.finish(federation.begin())
    assert float(federation.root.planner.shared["y"][0]) == pytest.approx(0.2, abs=1e-3)
