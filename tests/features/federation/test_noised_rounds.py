"""Rounds whose masked sum has noise of its own: what is in it, who drops out of it, and what the ledgers say of it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.errors import BudgetExhausted, LedgerError, ProtocolError, RecipeError, RoundLostError
from isthmus.federation.collection import Collected
from isthmus.federation.contribution import Contribution
from isthmus.federation.planner import RootPlanner
from isthmus.privacy import distributed_gaussian
from isthmus.privacy.accountant import Accountant
from isthmus.privacy.analytic import concentrated_epsilon
from isthmus.privacy.budget import Budget
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import Recipe
from isthmus.silo import update
from isthmus.silo.boundary import Boundary
from isthmus.silo.cohort import Cohort
from isthmus.silo.update import Updates, noised_updates
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RoleDirectory
from isthmus.updates.compression import Compression
from isthmus.updates.flat import Layout
from isthmus.updates.quantize import Ring
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel
from isthmus.wire.identity import Identity
from tests.conftest import make_recipe
from tests.features.federation.test_edges import DEEP, WARDS, Tree
from tests.features.federation.test_edges import IDENTITIES as EDGED
from tests.features.federation.test_masked_rounds import IDENTITIES, NAMES, Federation, Root, Silo

SHAPES = {"x": (50, 100), "y": (24,)}
COUNT = 50 * 100 + 24
CLIP, MULTIPLIER = 2.0, 0.5
DELTA = 1e-5


class NoisedSilo(Silo):
    def __init__(self, name: str, root: Root, recipe: Recipe, identity: Identity | None = None) -> None:
        self.channel = LoopbackChannel(root, name)
        self.boundary = Boundary(recipe.boundary, budget=Budget(recipe.privacy))
        compression = Compression.of(recipe)
        self.updates = noised_updates(
            recipe,
            self.boundary,
            self.channel,
            identity or IDENTITIES[name],
            compression,
            Cohort.of(recipe.tree.node("root")),
        )


class Noised(Federation):
    """A federation of such silos, which learn changes of this L2 norm."""

    def __init__(
        self,
        store: RoleDirectory,
        *,
        norms: dict[str, float] | None = None,
        noise: dict[str, Any] | None = None,
        clip: dict[str, Any] | None = None,
        **sections: Any,
    ) -> None:
        federation = {
            "secure": True,
            "weights": "equal",
            "noise": noise or {"multiplier": MULTIPLIER},
            "clip": {"norm": CLIP} | (clip or {}),
        } | sections.pop("federation", {})
        super().__init__(store, shapes=SHAPES, federation=federation, **sections)
        self.silos = {name: NoisedSilo(name, self.root, self.recipe) for name in NAMES}
        self.lengthen(norms or dict.fromkeys(NAMES, 1.0))

    def lengthen(self, norms: dict[str, float]) -> None:
        for name, norm in norms.items():
            length = math.sqrt(sum(float(tensor.square().sum()) for tensor in self.changes[name].values()))
            self.changes[name] = {key: tensor * (norm / length) for key, tensor in self.changes[name].items()}

    def round(self, names: tuple[str, ...] = NAMES, **how: Any) -> None:
        assert self.finish(self.begin(names), names, **how) == dict.fromkeys(names)

    def released(self, name: str = "a") -> list[Any]:
        return self.silos[name].boundary.ledger.releases


@pytest.fixture
def store(tmp_path: Path) -> RoleDirectory:
    return RoleDirectory(tmp_path)


@pytest.fixture
def concluded(monkeypatch: pytest.MonkeyPatch) -> list[Collected]:
    """What the root learned of each round."""
    seen: list[Collected] = []
    conclude = RootPlanner.conclude

    def kept(self: RootPlanner, round: int, collected: Collected) -> Answer:
        seen.append(collected)
        return conclude(self, round, collected)

    monkeypatch.setattr(RootPlanner, "conclude", kept)
    return seen


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What silos round their updates to, and what they draw, in the order in which they do."""
    rounded: list[np.ndarray] = []
    drawn: list[np.ndarray] = []
    encode, draw = Ring.encode_short, update.discrete_gaussian

    def encoding(self: Ring, values_P: Any, bound: float) -> np.ndarray:
        rounded.append(encode(self, values_P, bound))
        return rounded[-1]

    def drawing(*arguments: Any) -> np.ndarray:
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(Ring, "encode_short", encoding)
    monkeypatch.setattr(update, "discrete_gaussian", drawing)
    return rounded, drawn


def row(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[key].flatten().double() for key in sorted(tensors)])


# --- the sum


def test_the_sum_is_the_rounded_updates_and_all_shares_of_noise_exactly(
    store: RoleDirectory, concluded: list[Collected], parts: tuple[list[np.ndarray], list[np.ndarray]]
) -> None:
    federation = Noised(store)
    federation.round()
    rounded, drawn = parts
    assert (len(rounded), len(drawn)) == (4, 4)
    plain = sum(one.astype(np.int64) for one in rounded)
    assert concluded[0].total_KS is not None
    assert (concluded[0].total_KS[:COUNT] == plain + sum(drawn)).all()
    mean = torch.stack([row(change) for change in federation.changes.values()]).mean(0)
    step = CLIP / Ring(1, 1.0).levels
    free = torch.from_numpy(plain) * step / 4
    assert (free - mean).abs().max() <= step * 1.1
    assert (row(federation.root.planner.shared) - torch.from_numpy(plain + sum(drawn)) * step / 4).abs().max() < 1e-6


@pytest.mark.parametrize("bits", [6, 16])
def test_the_sums_noise_has_the_stated_deviation(store: RoleDirectory, bits: int) -> None:
    federation = Noised(store, minimum=4, federation={"compression": {"bits": bits, "feedback": False}})
    federation.round()
    (event,) = federation.released()
    rest = 4 * row(federation.root.planner.shared) - sum(row(change) for change in federation.changes.values())
    rounding = (CLIP / (2 ** (bits - 1) - 1)) ** 2 / 4 * 4  # at most, of four silos
    assert event.noise**2 * 0.9 < float(rest.square().mean()) < event.noise**2 * 1.1 + rounding
    assert event.noise == pytest.approx(MULTIPLIER * CLIP, rel=1e-3) if bits == 16 else event.noise > MULTIPLIER * CLIP


def test_noise_is_no_less_when_as_many_silos_drop_out_as_may(store: RoleDirectory) -> None:
    federation = Noised(store, minimum=3, patience=1.0)
    federation.round(NAMES[:3])
    (event,) = federation.released()
    assert event.honest == 3
    rest = 3 * row(federation.root.planner.shared) - sum(row(federation.changes[name]) for name in NAMES[:3])
    assert float(rest.square().mean()) == pytest.approx(event.noise**2, rel=0.1)
    assert event.noise >= MULTIPLIER * CLIP


def test_with_all_silos_there_is_more_than_was_asked_for(store: RoleDirectory) -> None:
    federation = Noised(store, minimum=3, noise={"multiplier": MULTIPLIER, "colluding": 1})
    federation.round()
    (event,) = federation.released()
    assert event.honest == 2
    rest = 4 * row(federation.root.planner.shared) - sum(row(change) for change in federation.changes.values())
    assert float(rest.square().mean()) == pytest.approx(2 * event.noise**2, rel=0.1)


def test_a_silo_that_learned_nothing_adds_its_noise_and_is_charged_nothing(
    store: RoleDirectory, concluded: list[Collected]
) -> None:
    federation = Noised(store)
    federation.round(weight=dict.fromkeys(NAMES, 1.0) | {"d": 0.0})
    assert federation.released("d") == []
    (event,) = federation.released()
    rest = 3 * row(federation.root.planner.shared) - sum(row(federation.changes[name]) for name in NAMES[:3])
    assert float(rest.square().mean()) == pytest.approx(event.noise**2 * 4 / 3, rel=0.1)


def test_an_update_beyond_the_clip_is_shortened_and_what_is_no_number_is_zero(
    store: RoleDirectory, parts: tuple[list[np.ndarray], list[np.ndarray]]
) -> None:
    federation = Noised(store, norms={"a": 50.0, "b": 0.0, "c": 1.0, "d": 1e30})
    federation.changes["c"]["y"][:] = torch.tensor([math.nan, math.inf, -math.inf] + [0.0] * 21)
    federation.round()
    levels = Ring(1, 1.0).levels
    bound = distributed_gaussian.rounded(levels, COUNT)
    lengths = sorted(float(np.linalg.norm(one.astype(float))) for one in parts[0])
    assert lengths[0] == 0.0
    assert lengths[1] == pytest.approx(levels / CLIP, rel=0.01)
    assert all(levels * 0.99 < length <= bound for length in lengths[2:])


def test_a_vector_that_rounds_too_long_is_rounded_again() -> None:
    ring, count = Ring(3, 1.0, bits=4), 4000
    values = np.full(count, ring.range / math.sqrt(count), np.float32)
    bound = distributed_gaussian.rounded(ring.levels, count)
    mean = np.zeros(count)
    for _ in range(50):
        whole = ring.encode_short(values, bound).astype(float)
        assert whole @ whole <= bound**2
        mean += whole / 50
    assert mean.mean() == pytest.approx(ring.levels / math.sqrt(count), rel=0.05)


# --- what it costs


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_ledger_notes_the_sums_guarantee_before_the_frame_leaves(store: RoleDirectory, adaptive: bool) -> None:
    federation = Noised(store, clip={"quantile": 0.5} if adaptive else {}, minimum=3)
    seen: list[int] = []
    federation.root.lie = lambda peer, request: (
        seen.append(len(federation.released(peer))) if isinstance(request, pb.Update) else None
    )
    federation.round()
    assert seen == [1 + adaptive] * 4
    update, *norms = federation.released()
    assert (update.path, update.mechanism, update.rows, update.width) == ("update", "summed", 1, COUNT)
    assert (update.clip, update.honest, update.summed) == (CLIP, 3, 3)
    assert update.size == len(next(r for _, r in federation.root.seen if isinstance(r, pb.Update)).masked)
    assert [(one.path, one.width, one.honest) for one in norms] == [("norm", 1, 3)] * adaptive
    whole = Accountant(DELTA, federation.released()).silo
    assert whole.concentrated == pytest.approx(2 / MULTIPLIER**2, rel=1e-6)
    assert whole.epsilon(DELTA).value == pytest.approx(concentrated_epsilon(2 / MULTIPLIER**2, DELTA), rel=1e-6)


def test_a_budget_lets_so_many_updates_leave_and_no_more(store: RoleDirectory) -> None:
    bounded = {path: {"clip": 1.0, "noise": 1.0} for path in ("forward", "gradient")}
    federation = Noised(
        store, noise={"epsilon": 6.0}, privacy={"silo_epsilon": 4.0, "delta": DELTA}, rounds=3, boundary=bounded
    )
    silo = federation.silos["a"]
    assert silo.updates.affordable()
    federation.round()
    assert not silo.updates.affordable()
    assert isinstance(federation.finish(federation.begin())["a"], BudgetExhausted)
    assert len(federation.released()) == 1


# --- who misbehaves


def test_a_silo_gives_no_share_for_a_sum_of_too_few(store: RoleDirectory) -> None:
    federation = Noised(store, minimum=4, patience=1.0)
    rounds = federation.root.rounds
    rounds._node = replace(rounds._node, minimum=3)  # a root that goes on with fewer than the recipe says
    ended = federation.finish(federation.begin(), NAMES[:3])
    assert all(isinstance(ended[name], ProtocolError) for name in NAMES[:3])
    assert "3 silos survive, the recipe needs 4" in str(ended["a"])
    assert not any(isinstance(request, pb.Reveal) for _, request in federation.root.seen)


def test_too_few_silos_lose_the_round(store: RoleDirectory) -> None:
    federation = Noised(store, patience=1.0)
    ended = federation.finish(federation.begin(), NAMES[:2])
    assert all(isinstance(error, RoundLostError) for error in ended.values())


@pytest.mark.parametrize(
    ("clip", "told"), [({}, 1.5), ({}, 0.0), ({"quantile": 0.5}, math.inf), ({"quantile": 0.5}, 0.0)]
)
def test_a_plan_with_another_clip_is_refused(store: RoleDirectory, clip: dict[str, Any], told: float) -> None:
    federation = Noised(store, clip=clip)
    plans = federation.plans()
    plans["a"].clip = told
    with pytest.raises(ProtocolError, match="a plan with the clip"):
        federation.silos["a"].updates.begin(plans["a"], Layout(SHAPES))


def test_noise_that_no_sum_has_room_for_is_refused_at_the_start(store: RoleDirectory) -> None:
    with pytest.raises(RecipeError, match="numbers and their noise does not fit into 32 bits"):
        Noised(store, noise={"multiplier": 1e5})


def test_a_clip_never_leaves_what_fits_into_a_number(store: RoleDirectory) -> None:
    federation = Noised(store, clip={"norm": 1e-12, "quantile": 0.01, "rate": 50.0}, norms=dict.fromkeys(NAMES, 1e-16))
    federation.round()
    assert federation.root.planner._clip.norm(2) >= 1e-12
    federation.round()
    assert row(federation.root.planner.shared).isfinite().all()


# --- the clip that follows


def test_the_clip_follows_the_quantile_of_norms_and_a_resumed_run_has_the_same(tmp_path: Path) -> None:
    """Norms 1, 2, 3, 4: half of them are within 2 to 3, where the clip goes from far below and above, noise and all."""
    norms = dict(zip(NAMES, (1.0, 2.0, 3.0, 4.0), strict=True))
    for start in (0.2, 30.0):
        store = RoleDirectory(tmp_path / str(start))
        how: dict[str, Any] = {
            "norms": norms,
            "noise": {"multiplier": 0.02},
            "clip": {"norm": start, "quantile": 0.5, "rate": 0.5},
            "rounds": 30,
        }
        federation = Noised(store, **how)
        for _ in range(12):
            federation.round()
        again = Noised(store, **how)
        assert again.root.planner.completed == 12
        assert {plan.clip for plan in again.plans().values()} == {federation.root.planner._clip.norm(13)}
        for _ in range(8):
            again.round()
        clips = [line["clip"] for line in read_journal(store.path / "metrics.jsonl")]
        assert clips[0] == start
        assert len(clips) == 20
        assert all(1.7 < clip < 3.5 for clip in clips[-4:])
        assert all(abs(math.log(after / before)) <= 0.25 + 1e-9 for before, after in pairwise(clips))


def test_the_bits_are_summed_with_noise_of_their_own(
    store: RoleDirectory, concluded: list[Collected], parts: tuple[list[np.ndarray], list[np.ndarray]]
) -> None:
    federation = Noised(store, norms={"a": 1.0, "b": 1.0, "c": 1.0, "d": 3.0}, clip={"quantile": 0.5})
    federation.round()
    levels, drawn = Ring(1, 1.0).levels, sum(int(one[0]) for one in parts[1] if len(one) == 1)
    assert concluded[0].total_KS is not None
    assert concluded[0].sums is not None
    assert concluded[0].total_KS[COUNT] == 2 * levels + drawn  # three yes, one no
    within = concluded[0].sums.within(concluded[0].total_KS)
    assert within == pytest.approx(0.75 + drawn / (8 * levels))
    _, norm = federation.released()
    assert norm.noise == pytest.approx(math.sqrt(1 / (2 * norm.charges[0].concentrated)), rel=1e-6)


def test_factors_that_take_turns_have_clips_of_their_own(store: RoleDirectory) -> None:
    federation = Noised(
        store,
        noise={"multiplier": 0.02},
        clip={"quantile": 0.5, "rate": 0.5},
        federation={"lora": "alternating"},
        rounds=9,
    )
    planner = federation.root.planner
    planner.shared = {"q.lora_A.weight": torch.zeros(30, 8), "q.lora_B.weight": torch.zeros(6, 30)}
    lengths = {"q.lora_B.weight": 0.5, "q.lora_A.weight": 20.0}
    for round in range(1, 7):
        key = "q.lora_B.weight" if round % 2 else "q.lora_A.weight"
        federation.changes = {name: {key: torch.randn(planner.shared[key].shape)} for name in NAMES}
        federation.lengthen(dict.fromkeys(NAMES, lengths[key]))
        federation.round()
    assert planner._clip.norm(7) < CLIP < planner._clip.norm(8)


# --- what crosses of it


@pytest.mark.parametrize("compression", ["random-k", "sketch"])
def test_projections_that_lengthen_nothing_keep_the_bound(
    store: RoleDirectory, compression: str, parts: tuple[list[np.ndarray], list[np.ndarray]]
) -> None:
    federation = Noised(
        store,
        norms=dict.fromkeys(NAMES, 40.0),
        federation={"compression": {"kind": compression, "keep": 0.25, "feedback": False}},
    )
    federation.round()
    (event,) = federation.released()
    assert abs(event.width - COUNT / 4) < 65
    bound = distributed_gaussian.rounded(Ring(1, 1.0).levels, event.width)
    assert all(np.linalg.norm(one.astype(float)) <= bound for one in parts[0])


# --- the root's noise


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_root_noises_what_it_publishes_and_keeps_a_ledger_of_it(
    store: RoleDirectory, adaptive: bool, parts: tuple[list[np.ndarray], list[np.ndarray]]
) -> None:
    federation = Noised(
        store, noise={"multiplier": MULTIPLIER, "where": "root"}, clip={"quantile": 0.5} if adaptive else {}
    )
    federation.round()
    assert parts[1] == []  # the silos drew nothing
    releases = list(read_ledger(store.path / "ledger.jsonl").releases())
    assert [(one.path, one.honest) for one in releases] == [("update", 1), ("norm", 1)][: 1 + adaptive]
    rest = 4 * row(federation.root.planner.shared) - sum(row(change) for change in federation.changes.values())
    assert float(rest.square().mean()) == pytest.approx(releases[0].noise ** 2, rel=0.1)
    spent = Accountant(DELTA, releases).silo
    assert spent.concentrated == pytest.approx(2 / MULTIPLIER**2, rel=1e-6)
    assert [one.charges[0].bounded for one in federation.released()] == [False] * (1 + adaptive)
    assert federation.silos["a"].updates.affordable()


def test_a_root_that_sees_updates_clips_and_noises_their_mean(store: RoleDirectory) -> None:
    """Whatever silos send and say that they weigh, one of them moves the sum by its clip at most."""
    recipe = make_recipe(
        Path("none"),
        silos=NAMES,
        federation={
            "weights": "equal",
            "noise": {"multiplier": MULTIPLIER, "where": "root"},
            "clip": {"norm": CLIP, "quantile": 0.5, "rate": 0.4},
        },
    )
    planner = RootPlanner(recipe, {key: torch.zeros(shape) for key, shape in SHAPES.items()}, store)
    draw = torch.Generator().manual_seed(1)
    changes, kept = {}, {}
    for name, norm in zip(NAMES, (1.0, 2.5, 1e6, 0.5), strict=True):
        change = {key: torch.randn(shape, generator=draw) for key, shape in SHAPES.items()}
        length = float(row(change).norm())
        changes[name] = {key: tensor * (norm / length) for key, tensor in change.items()}
        kept[name] = {key: tensor * (min(norm, CLIP) / length) for key, tensor in change.items()}
    learned = tuple(Contribution(name, 10.0 ** len(name), change) for name, change in changes.items())
    plan = planner.plan(NAMES).result()
    planner.conclude(1, Collected(dict.fromkeys(NAMES, 1.0), learned))
    update, norm = read_ledger(store.path / "ledger.jsonl").releases()
    rest = 4 * row(planner.shared) - sum(row(change) for change in kept.values())
    assert float(rest.square().mean()) == pytest.approx(update.noise**2, rel=0.1)
    assert update.charges[0].concentrated + norm.charges[0].concentrated == pytest.approx(2 / MULTIPLIER**2, rel=1e-6)
    assert plan.clip == CLIP
    assert abs(math.log(planner.plan(NAMES).result().clip / CLIP)) <= 0.2 + 1e-9
    planner.conclude(2, Collected(dict.fromkeys(NAMES, 0.0), ()))  # nobody learned anything: nothing is published
    assert len(list(read_ledger(store.path / "ledger.jsonl").releases())) == 2


def test_a_root_that_starts_again_needs_its_ledger(store: RoleDirectory) -> None:
    how: dict[str, Any] = {"noise": {"multiplier": MULTIPLIER, "where": "root"}}

    def again(federation: Noised) -> Noised:
        federation.root.planner._noise._ledger.close()
        return Noised(store, **how)

    federation = Noised(store, **how)
    federation.round(weight=dict.fromkeys(NAMES, 0.0))  # nobody learned anything, so nothing was published
    federation = again(federation)
    federation.round()
    federation = again(federation)
    assert federation.root.planner.completed == 2
    assert len(list(read_ledger(store.path / "ledger.jsonl").releases())) == 1
    for file in ("ledger.jsonl", "ledger.head"):
        (store.path / file).unlink()
    with pytest.raises(LedgerError, match="releases were made"):
        again(federation)


# --- edges


class NoisedTree(Tree):
    """Edges whose silos noise their cohort's sum."""

    def updates(self, name: str) -> tuple[Updates, LoopbackChannel]:
        channel = LoopbackChannel(self.nodes[self.recipe.tree.parent(name)], name)
        boundary = Boundary(self.recipe.boundary)
        self.__dict__.setdefault("boundaries", {})[name] = boundary
        compression = Compression.of(self.recipe)
        cohort = Cohort.of(self.recipe.tree.node(self.recipe.tree.parent(name)))
        return noised_updates(self.recipe, boundary, channel, EDGED[name], compression, cohort), channel


@pytest.mark.parametrize("quantile", [None, 0.5])
@pytest.mark.parametrize("edges", [WARDS, DEEP], ids=["two tiers", "three tiers"])
def test_cohorts_sums_go_up_exactly_noise_and_all(
    tmp_path: Path,
    edges: Any,
    quantile: float | None,
    concluded: list[Collected],
    parts: tuple[list[np.ndarray], list[np.ndarray]],
) -> None:
    """Each cohort's sum has enough noise by itself; what the root learns is the integer sum of all silos' numbers."""
    clip = {"norm": CLIP, "quantile": quantile} if quantile else {"norm": CLIP}
    noise = {"multiplier": MULTIPLIER, "colluding": 1}
    tree = NoisedTree(tmp_path, edges, masked_range=0.25, weights="equal", noise=noise, clip=clip)
    tree.run()
    rounded, drawn = parts
    size = len(rounded[0])
    expected = sum(one.astype(np.int64) for one in rounded) + sum(d for d in drawn if len(d) == size)
    totals = [one.total_KS for one in concluded if one.total_KS is not None]
    assert len(totals) == 2
    assert (totals[0][:size] + totals[1][:size] == expected).all()
    assert {one.honest for one in tree.boundaries["a"].ledger.releases} == {2}
    clips = [line["clip"] for line in read_journal(tmp_path / "root" / "metrics.jsonl")]
    assert clips[0] == CLIP
    assert (clips[1] != CLIP) == (quantile is not None)
