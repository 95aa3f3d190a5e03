"""Rounds whose updates are summed under masks, played by the silos' own code over loopback: the sum is the open one's,
whoever drops out or misbehaves, and the root gets nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus.errors import FrameError, IdentityError, IsthmusError, ProtocolError, QuorumError, RoundLostError
from isthmus.federation.planner import RootPlanner
from isthmus.federation.rounds import Rounds
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary
from isthmus.silo.cohort import Cohort
from isthmus.silo.update import MaskedUpdates
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RoleDirectory
from isthmus.updates.compression import Compression
from isthmus.updates.flat import Layout
from isthmus.updates.quantize import Ring
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.channel import Answer, LoopbackChannel
from isthmus.wire.identity import Identity
from tests.conftest import make_recipe

SHAPES = {"x": (20, 30), "y": (4,)}
COUNT = 20 * 30 + 4
RANGE = 0.5
STEP = RANGE / Ring(1, RANGE).levels
SOON, LONG, WAIT = 1.0, 600.0, 60.0
NAMES = ("a", "b", "c", "d")
Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]
AUTHORITY = Authority()
IDENTITIES = {name: AUTHORITY.issue(name) for name in (*NAMES, "root")}


class Root:
    """The root's rounds as a service that keeps what it gets, and can be made to lie."""

    def __init__(self, recipe: Recipe, store: RoleDirectory, shapes: Shapes) -> None:
        self.planner = RootPlanner(recipe, {name: torch.zeros(shape) for name, shape in shapes.items()}, store)
        self.rounds = Rounds(recipe, self.planner)
        self.seen: list[tuple[str, Message]] = []
        self.lie: Callable[[str, Message], None] = lambda peer, request: None
        """Changes a request before the root's honest half sees it."""

    def handle(self, peer: str, request: Message) -> Answer:
        kept = type(request)()
        kept.CopyFrom(request)
        self.seen.append((peer, kept))
        self.lie(peer, request)
        if isinstance(request, pb.Ready):
            return self.rounds.ready(peer, request)
        assert isinstance(request, (pb.Deal, pb.Update, pb.Agree, pb.Reveal))
        return self.rounds.contribute(peer, request)


class Silo:
    """What a worker does with its updates."""

    def __init__(self, name: str, root: Root, recipe: Recipe, identity: Identity | None = None) -> None:
        self.channel = LoopbackChannel(root, name)
        self.boundary = Boundary(recipe.boundary)
        compression = Compression(recipe.federation, recipe.seed)
        self.updates = MaskedUpdates(
            self.boundary, self.channel, identity or IDENTITIES[name], compression, Cohort.of(recipe.tree.node("root"))
        )

    def ask(self) -> Answer:
        return self.channel.submit(pb.Ready(keys=self.updates.offer()))

    def finish(self, plan: Any, change: Tensors, weight: float = 3.0, share: float = 1.0) -> IsthmusError | None:
        """The rest of a round after its begin; the error with which it ended."""
        try:
            self.updates.send(self.updates.pack(plan, change, weight, share))
        except IsthmusError as error:
            return error
        return None


class Federation:
    """Silos of one root; each round everyone learns what ``changes`` says."""

    def __init__(
        self,
        store: RoleDirectory,
        *,
        patience: float = LONG,
        minimum: int = 3,
        rounds: int = 2,
        shapes: Shapes = SHAPES,
        **sections: Any,
    ) -> None:
        self.recipe = make_recipe(
            Path("none"),
            silos=NAMES,
            federation={"secure": {"masks": True, "range": RANGE}, **sections.pop("federation", {})},
            root={"patience": patience, "minimum": minimum},
            train={"rounds": rounds, "evaluate": False},
            **sections,
        )
        self.root = Root(self.recipe, store, shapes)
        self.silos = {name: Silo(name, self.root, self.recipe) for name in NAMES}
        draw = torch.Generator().manual_seed(0)
        self.changes = {
            name: {key: 0.1 * torch.randn(shape, generator=draw) for key, shape in shapes.items()} for name in NAMES
        }

    def plans(self) -> dict[str, Any]:
        answers = {name: silo.ask() for name, silo in self.silos.items()}
        return {name: answer.result(WAIT) for name, answer in answers.items()}

    def begin(self, names: Sequence[str] = NAMES) -> dict[str, Any]:
        plans = self.plans()
        for name in names:
            self.silos[name].updates.begin(plans[name], Layout.of(self.changes[name]))
        return plans

    def finish(
        self, plans: dict[str, Any], names: Sequence[str] = NAMES, **how: dict[str, float]
    ) -> dict[str, IsthmusError | None]:
        with ThreadPoolExecutor(len(names)) as threads:
            ended = {
                name: threads.submit(
                    self.silos[name].finish,
                    plans[name],
                    self.changes[name],
                    **{key: values[name] for key, values in how.items()},
                )
                for name in names
            }
            return {name: one.result(WAIT) for name, one in ended.items()}

    def mean(self, shares: dict[str, float]) -> Tensors:
        total = sum(shares.values())
        return {
            key: sum((share / total * self.changes[name][key] for name, share in shares.items()), torch.zeros(shape))
            for key, shape in SHAPES.items()
        }

    def assert_learned(self, shares: dict[str, float]) -> None:
        """The round's result is the open weighted mean but for the rounding of each silo's numbers."""
        shared = self.root.planner.shared
        for key, expected in self.mean(shares).items():
            assert (shared[key] - expected).abs().max() <= len(shares) / sum(shares.values()) * STEP * 1.1


@pytest.fixture
def store(tmp_path: Path) -> RoleDirectory:
    return RoleDirectory(tmp_path)


@pytest.fixture
def federation(store: RoleDirectory) -> Federation:
    return Federation(store)


def test_the_round_learns_the_mean_and_the_next_goes_on_from_it(federation: Federation, store: RoleDirectory) -> None:
    assert federation.finish(federation.begin()) == dict.fromkeys(NAMES)
    federation.assert_learned(dict.fromkeys(NAMES, 1.0))
    plans = federation.begin()
    assert {(plan.round, plan.completed) for plan in plans.values()} == {(2, 1)}
    first = federation.root.planner.shared
    federation.finish(plans)
    for key in SHAPES:
        assert torch.allclose(federation.root.planner.shared[key], 2 * first[key], atol=3 * STEP)
    assert [line["weights"] for line in read_journal(store.path / "metrics.jsonl")] == [dict.fromkeys(NAMES, 1.0)] * 2
    assert federation.plans()["a"].round == 0


def test_where_factors_alternate_a_sum_is_of_one(store: RoleDirectory) -> None:
    a, b = "q.lora_A.weight", "q.lora_B.weight"
    federation = Federation(store, federation={"lora": "alternating"}, shapes={a: (3, 8), b: (6, 3)})
    all_changes = federation.changes
    for moved, sent in ((b, 18), (a, 24)):
        federation.changes = {name: {moved: change[moved]} for name, change in all_changes.items()}
        assert federation.finish(federation.begin()) == dict.fromkeys(NAMES)
        (*_, last) = federation.silos["a"].boundary.ledger.releases
        assert last.summed == 3  # the recipe's minimum
        assert last.width == sent
    for key, actual in federation.root.planner.shared.items():
        expected = sum((change[key] / len(NAMES) for change in all_changes.values()), torch.zeros_like(actual))
        assert (actual - expected).abs().max() <= 1.1 * STEP


def test_silos_weigh_by_their_share_and_one_that_learned_nothing_by_none(federation: Federation) -> None:
    shares = {"a": 1.0, "b": 0.5, "c": 0.25, "d": 1.0}
    weights = dict.fromkeys(NAMES, 1.0) | {"d": 0.0}
    assert federation.finish(federation.begin(), share=shares, weight=weights) == dict.fromkeys(NAMES)
    federation.assert_learned({name: share for name, share in shares.items() if name != "d"})


def test_of_too_few_that_learned_something_no_sum_is_known(federation: Federation) -> None:
    weights = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 1.0}
    assert federation.finish(federation.begin(), weight=weights) == dict.fromkeys(NAMES)
    assert not any(isinstance(request, pb.Reveal) for _, request in federation.root.seen)
    with pytest.raises(QuorumError, match="2 silos are left, the recipe needs 3"):
        federation.plans()


def test_a_round_in_which_nobody_learned_anything_changes_nothing(federation: Federation) -> None:
    assert federation.finish(federation.begin(), weight=dict.fromkeys(NAMES, 0.0)) == dict.fromkeys(NAMES)
    assert not any(tensor.any() for tensor in federation.root.planner.shared.values())
    assert federation.plans()["a"].round == 2
    assert not any(isinstance(request, pb.Reveal) for _, request in federation.root.seen)
    assert federation.silos["a"].boundary.released_bytes == {}


def test_what_the_root_gets_is_masked_and_another_each_time(federation: Federation) -> None:
    """The same changes twice: no two of all frames' payloads are alike, and none is the plain one's."""
    for _ in range(2):
        federation.finish(federation.begin())
    ring = Ring(len(NAMES), RANGE)
    updates = [(peer, request) for peer, request in federation.root.seen if isinstance(request, pb.Update)]
    assert len(updates) == 8
    assert not any(request.tensors for _, request in updates)
    assert all(request.learned for _, request in updates)
    payloads = [ring.unpack(ring.read(request.masked, COUNT + 1), COUNT + 1) for _, request in updates]
    for number, payload in enumerate(payloads):
        plain = ring.encode(
            torch.cat([federation.changes[updates[number][0]][key].flatten() for key in SHAPES]).numpy()
        )
        assert (payload[:-1] == plain).mean() < 0.01
        assert all((payload == other).mean() < 0.01 for other in payloads[:number])
    keys = [request.keys for _, request in federation.root.seen if isinstance(request, pb.Ready)]
    assert len({one.masking for one in keys}) == len(keys) == 8
    shares = [request.shares for _, request in federation.root.seen if isinstance(request, pb.Reveal)]
    assert all(set(one) == set(NAMES) for one in shares)


def test_an_update_is_as_large_as_its_numbers_and_is_noted_so(federation: Federation) -> None:
    federation.finish(federation.begin())
    ring = Ring(len(NAMES), RANGE)
    due = math.ceil((COUNT + 1) / ring.numbers) * ring.width
    assert (ring.numbers, ring.width) == (3, 7)
    sizes = {len(request.masked) for _, request in federation.root.seen if isinstance(request, pb.Update)}
    assert sizes == {due}
    assert federation.silos["a"].boundary.released_bytes["update"] == due


@pytest.mark.parametrize("last", ["nothing", "shares", "an update"])
def test_the_others_go_on_without_a_silo_that_dies(store: RoleDirectory, last: str) -> None:
    """After nothing, dealt shares or its update: who sent an update is in the sum, the others are not."""
    federation = Federation(store, patience=SOON)
    plans = federation.begin(NAMES[:3] if last == "nothing" else NAMES)
    senders = NAMES if last == "an update" else NAMES[:3]
    federation.silos["d"].channel.call = federation.silos["d"].channel.submit  # type: ignore[method-assign]
    assert federation.finish(plans, senders) == dict.fromkeys(senders)  # d waits for no answer to its update
    federation.assert_learned(dict.fromkeys(senders, 1.0))


def test_a_silo_that_comes_back_in_mid_round_is_out_of_it_and_in_the_next(federation: Federation) -> None:
    plans = federation.begin()
    again = Silo("d", federation.root, federation.recipe)
    waiting = again.ask()
    assert federation.finish(plans, NAMES[:3]) == dict.fromkeys(NAMES[:3])
    federation.assert_learned(dict.fromkeys(NAMES[:3], 1.0))
    federation.silos["d"] = again
    answers = [federation.silos[name].ask() for name in NAMES[:3]]
    assert {answer.result(WAIT).round for answer in (*answers, waiting)} == {2}


def test_when_all_begin_anew_the_same_round_does(federation: Federation) -> None:
    federation.begin()
    assert {plan.round for plan in federation.begin().values()} == {1}


def test_too_few_living_silos_lose_the_round_and_begin_it_again(store: RoleDirectory) -> None:
    federation = Federation(store, patience=SOON)
    ended = federation.finish(federation.begin(), NAMES[:2])
    assert all(isinstance(error, RoundLostError) for error in ended.values())
    assert "2 silos sent their updates" in str(ended["a"])
    assert federation.finish(federation.begin()) == dict.fromkeys(NAMES)
    federation.assert_learned(dict.fromkeys(NAMES, 1.0))


# --- who misbehaves


def test_keys_that_another_signed_are_refused_by_every_silo(federation: Federation) -> None:
    federation.silos["d"] = Silo("d", federation.root, federation.recipe, Authority().issue("d"))
    plans = federation.plans()
    with pytest.raises(IdentityError, match="another authority"):
        federation.silos["a"].updates.begin(plans["a"], Layout(SHAPES))


def test_a_root_that_puts_in_its_own_keys_is_found_out(federation: Federation) -> None:
    plans = federation.plans()
    other = Silo("b", federation.root, federation.recipe).updates
    plans["a"].keys["b"].masking = other.offer().masking
    with pytest.raises(IdentityError, match="is not valid for the data"):
        federation.silos["a"].updates.begin(plans["a"], Layout(SHAPES))
    plans["c"].participants.remove("b")
    with pytest.raises(ProtocolError, match="which does not take part"):
        federation.silos["c"].updates.begin(plans["c"], Layout(SHAPES))


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        (pb.Update(round=1, learned=True, masked=b"short"), FrameError, "5 bytes, "),
        (pb.Update(round=1, weight=1.0), ProtocolError, "updates are masked"),
        (
            pb.Update(round=1, weight=1.0, tensors=codec.encode_named({k: torch.ones(s) for k, s in SHAPES.items()})),
            ProtocolError,
            "updates are masked",
        ),
        (pb.Reveal(round=1, shares={"a": bytes(33)}), RoundLostError, "comes too late"),
        (pb.Update(round=2, weight=1.0), RoundLostError, "round 2"),
    ],
)
def test_a_malformed_update_is_refused_and_the_rest_goes_on(
    store: RoleDirectory, wrong: Message, error: type[IsthmusError], told: str
) -> None:
    federation = Federation(store, patience=SOON)
    plans = federation.begin()
    federation.silos["d"].updates._dealt.result(WAIT)  # type: ignore[attr-defined]
    with pytest.raises(error, match=told):
        federation.silos["d"].channel.call(wrong)
    assert federation.finish(plans, NAMES[:3]) == dict.fromkeys(NAMES[:3])
    federation.assert_learned(dict.fromkeys(NAMES[:3], 1.0))


def test_what_is_sent_twice_is_refused(federation: Federation) -> None:
    plans = federation.begin()
    deal = next(request for peer, request in federation.root.seen if isinstance(request, pb.Deal) and peer == "a")
    with pytest.raises(RoundLostError, match="comes too late"):
        federation.silos["a"].channel.call(deal)
    assert federation.finish(plans) == dict.fromkeys(NAMES)
    late = next(request for peer, request in federation.root.seen if isinstance(request, pb.Update) and peer == "a")
    with pytest.raises(RoundLostError):
        federation.silos["a"].channel.call(late)


def test_shares_altered_on_their_way_are_found_by_the_silo_and_left_out(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:

    def alter(peer: str, request: Message) -> None:
        if isinstance(request, pb.Deal) and peer == "b":
            request.sealed["a"] = bytes(len(request.sealed["a"]))

    federation.root.lie = alter
    assert federation.finish(federation.begin()) == dict.fromkeys(NAMES)
    assert "shares of b were altered" in caplog.text
    federation.assert_learned(dict.fromkeys(NAMES, 1.0))


def test_altered_shares_in_the_end_lose_the_round_not_the_run(federation: Federation) -> None:
    def alter(peer: str, request: Message) -> None:
        if isinstance(request, pb.Reveal) and peer != "a":
            request.shares["a"] = bytes(33)

    federation.root.lie = alter
    ended = federation.finish(federation.begin())
    assert all(isinstance(error, RoundLostError) for error in ended.values())
    assert "masked sum failed" in str(ended["a"])
    assert "false shares came from b, c, d" in str(ended["a"])
    federation.root.lie = lambda peer, request: None
    plans = federation.begin()
    assert plans["a"].round == 1
    assert federation.finish(plans) == dict.fromkeys(NAMES)
    federation.assert_learned(dict.fromkeys(NAMES, 1.0))


def test_a_root_that_says_a_living_silo_is_dead_learns_no_key(federation: Federation) -> None:
    """It asks some for a silo's seed and others for its key: there are never enough of both."""
    plans = federation.begin()
    for name in NAMES:
        updates = federation.silos[name].updates
        updates._accept(updates._dealt.result(WAIT))  # type: ignore[union-attr]
    members = {name: silo.updates._member for name, silo in federation.silos.items()}
    threshold = members["a"].terms.threshold
    seeds = [name for name in NAMES[:2] if members[name].reveal(NAMES, [])["d"]]
    keys = [name for name in NAMES[2:3] if members[name].reveal(NAMES[:3], ["d"])["d"]]
    assert len(seeds) + len(keys) == 3 == threshold
    with pytest.raises(ProtocolError, match="said to be dead"):
        members["d"].reveal(NAMES[:3], ["d"])
    assert plans["a"].round == 1


def test_a_silo_without_keys_is_told_so(federation: Federation) -> None:
    with pytest.raises(ProtocolError, match="offers no keys"):
        federation.root.rounds.ready("a", pb.Ready())
