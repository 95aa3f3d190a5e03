"""A silo that claims to weigh more than its work takes no more of a step, or of a round, than its tokens give it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import FrameError, IsthmusError, ProtocolError
from isthmus.federation.aggregator import aggregator_of
from isthmus.federation.planner import RootPlanner
from isthmus.federation.rounds import Aggregator
from isthmus.storage.record import RoleDirectory
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.channel import Answer
from isthmus.wire.frames import checked, wrap
from tests.conftest import make_recipe, save_tiny_model
from tests.unit.trunk.drill import Drill, Silo, Work, recipe_of, results, tensors_of
from tests.unit.trunk.talk import WAIT

GOOD, BAD = "good", "bad"
GOODS: Work = (1, (3, 5))
BADS: Work = (2, (4,))
BATCH, LONGEST = 2, 16
HEAVY = (1e300, 1e9, 33.0, 4.5)
"""More than four tokens; of the third not even the recipe's batch has so many."""
STEPS: dict[str, Any] = {"steps": 3}
PASSES: dict[str, Any] = {"epochs": 3, "most_rows": 4}
"""Three passes over four rows at most, in batches of two: six steps in two rounds."""
ROOT = Authority().issue("root")
Claim = Callable[[Silo, float], Answer]
Build = Callable[..., Drill]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), blocks=4, initializer_range=0.3)


@pytest.fixture
def build(model: Path, tmp_path: Path) -> Iterator[Build]:
    """Starts a trunk of its own at each call."""
    drills: list[Drill] = []

    def start(**more: Any) -> Drill:
        train = {"steps": 2, "batch": BATCH, "max_tokens": LONGEST, "learning_rate": 0.1}
        recipe = recipe_of(model, silos=(GOOD, BAD), train=train, gather=0.0, **more)
        drills.append(Drill(recipe, tmp_path / f"run{len(drills)}"))
        return drills[-1]

    yield start
    for drill in drills:
        drill.service.stop()


def in_a_round(silo: Silo, weight: float, step: int = 1) -> Answer:
    return silo.commit(step, weight)


def in_an_open_round(silo: Silo, weight: float, step: int = 1, **how: Any) -> Answer:
    optimizer = pb.Optimizer(kind="sgd", learning_rate=0.1)
    return silo.channel.submit(pb.Commit(round=1, step=step, weight=weight, optimizer=optimizer, **how))


def begun(drill: Drill, claim: Claim) -> tuple[Silo, Silo]:
    good, bad = (drill.silos[name] for name in (GOOD, BAD))
    begin = pb.Begin(participants=(GOOD, BAD), open=claim is in_an_open_round, round=int(claim is in_a_round))
    results([silo.channel.submit(begin) for silo in (good, bad)])
    return good, bad


def refused(answer: Answer, error: type[IsthmusError], told: str) -> None:
    with pytest.raises(error, match=told) as caught:
        answer.result(WAIT)
    assert caught.value.remedy


@pytest.mark.parametrize("adapter", ["shared", "replica"])
@pytest.mark.parametrize("claim", [in_a_round, in_an_open_round])
def test_a_heavy_commit_is_refused_and_the_steps_are_as_if_it_had_never_come(
    claim: Claim, adapter: str, build: Build
) -> None:
    adapters = []
    for heavy in ((), HEAVY):
        drill = build(adapter=adapter)
        good, bad = begun(drill, claim)
        for step in (1, 2):
            good.work(GOODS)
            bad.work(BADS)
            for weight in heavy:
                said = re.escape(f"bad claims {weight:g} tokens in this step, its gradients may weigh 4")
                refused(claim(bad, weight, step), ProtocolError, said)
            results([claim(good, 8.0, step), claim(bad, 4.0, step)])
        adapters.append(drill.adapter())
    assert all(torch.equal(adapters[1][name], tensor) for name, tensor in adapters[0].items())


@pytest.mark.parametrize("claim", [in_a_round, in_an_open_round])
def test_whoever_sent_no_gradient_weighs_nothing(claim: Claim, build: Build) -> None:
    """Weight without gradients would shrink the others' step."""
    drill = build()
    good, bad = begun(drill, claim)
    good.work(GOODS)
    bad.forward(BADS).result(WAIT)
    gradient = codec.encode(tensors_of(BADS)[1], "fp32")
    bad.channel.call(pb.Backward(step=bad.last, gradient=gradient, reply=True, ascent_pass=True))
    before = drill.adapter()
    refused(claim(bad, 1.0), ProtocolError, "bad claims 1 tokens.*may weigh 0")
    results([claim(good, 8.0), claim(bad, 0.0)])
    after, alone = drill.adapter(), build()
    good, bad = begun(alone, claim)
    good.work(GOODS)
    results([claim(good, 8.0), claim(bad, 0.0)])
    assert all(torch.equal(after[name], tensor) for name, tensor in alone.adapter().items())
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_step_weighs_no_more_than_the_recipes_batch(build: Build) -> None:
    """However many tokens a silo has computed for it."""
    drill = build()
    good, bad = begun(drill, in_a_round)
    good.work(GOODS)
    bad.work(*[(seed, (LONGEST, LONGEST)) for seed in range(4)])
    refused(bad.commit(1, 33.0), ProtocolError, "bad claims 33 tokens.*may weigh 32")
    results([good.commit(1, 8.0), bad.commit(1, 32.0)])


def test_tokens_of_an_earlier_step_or_of_forgotten_gradients_do_not_count(build: Build) -> None:
    drill = build()
    good, bad = begun(drill, in_an_open_round)
    good.work(GOODS)
    bad.work(BADS, BADS)
    results([in_an_open_round(good, 8.0), in_an_open_round(bad, 8.0)])
    refused(in_an_open_round(bad, 9.0, 2), ProtocolError, "may weigh 8")  # the same gradients again
    bad.forward(BADS).result(WAIT)
    gradient = codec.encode(tensors_of(BADS)[1], "fp32")
    bad.channel.call(pb.Backward(step=bad.last, gradient=gradient, reply=True, keep=0.0))
    refused(in_an_open_round(bad, 8.0, 2), ProtocolError, "may weigh 4")
    bad.work(BADS)
    refused(in_an_open_round(bad, 9.0, 2), ProtocolError, "may weigh 8")
    results([in_an_open_round(good, 8.0, 2), in_an_open_round(bad, 8.0, 2)])


@pytest.mark.parametrize("factor", [1.5, -1.0, 1e300, float("nan"), float("inf")])
def test_nobody_multiplies_its_gradients_in_an_open_round(factor: float, build: Build) -> None:
    drill = build()
    good, bad = begun(drill, in_an_open_round)
    good.work(GOODS)
    bad.work(BADS)
    refused(in_an_open_round(bad, 4.0, scale=factor), FrameError, "the factor .* of gradients")
    bad.forward(BADS).result(WAIT)
    backward = pb.Backward(step=bad.last, gradient=codec.encode(tensors_of(BADS)[1], "fp32"), reply=True, keep=factor)
    refused(bad.channel.submit(backward), FrameError, "the factor .* of gradients")
    bad.backward(bad.last, BADS).result(WAIT)
    results([in_an_open_round(good, 8.0), in_an_open_round(bad, 8.0, scale=0.5)])


def test_a_heavy_commit_of_asynchronous_steps_is_refused(model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(model, silos=(GOOD, BAD), train={"steps": 1}, gather=0.0)
    federation = recipe.federation.model_copy(
        update={"asynchronous": recipe.federation.asynchronous.model_copy(update={"buffer": 2})}
    )
    drill = Drill(recipe.model_copy(update={"federation": federation}), tmp_path)
    bad = drill.silos[BAD]
    bad.begin(1, [BAD]).result(WAIT)
    bad.work(BADS)
    refused(bad.commit(1, 5.0), ProtocolError, "bad claims 5 tokens.*may weigh 4")
    assert bad.commit(1, 4.0).result(WAIT).contributors == 1
    drill.service.stop()


def change(value: float, weight: float, round: int = 1) -> pb.Update:
    return pb.Update(round=round, weight=weight, tensors=codec.encode_named({"x": torch.full((3,), value)}))


def root(federation: dict[str, Any], folder: Path, train: dict[str, Any] = STEPS, **more: Any) -> Aggregator:
    train = {"rounds": 2, "batch": BATCH, "max_tokens": LONGEST, "evaluate": False, **train}
    more = {"silos": (GOOD, BAD, "third"), **more}
    recipe = make_recipe(Path("none"), train=train, federation=federation, **more)
    return aggregator_of(recipe, "root", RootPlanner(recipe, {"x": torch.zeros(3)}, RoleDirectory(folder)), ROOT)


def plans(service: Aggregator, *children: str) -> list[Any]:
    return results([service.handle(child, pb.Ready()) for child in children])


def current(service: Aggregator) -> Any:
    return service.handle(GOOD, pb.Current()).result(WAIT)


@pytest.mark.parametrize("heavy", [1e300, 97.0])
@pytest.mark.parametrize(
    ("federation", "train"),
    [({}, STEPS), ({"asynchronous": {"buffer": 3}}, STEPS), ({}, PASSES)],
    ids=["rounds", "buffered", "passes"],
)
def test_an_update_weighs_no_more_than_the_recipes_rows(
    federation: dict[str, Any], train: dict[str, Any], heavy: float, tmp_path: Path
) -> None:
    """Three steps of two rows of sixteen tokens."""
    means = []
    for lies in (False, True):
        service = root(federation, tmp_path / str(lies), train)
        plans(service, GOOD, BAD, "third")
        if lies:
            with pytest.raises(ProtocolError, match=r"bad claims the weight .* it is 96 at most") as caught:
                service.handle(BAD, change(1e6, heavy))
            assert caught.value.remedy
        results(
            [service.handle(name, change(value, 96.0)) for name, value in ((GOOD, 1.0), (BAD, 2.0), ("third", 6.0))]
        )
        means.append(current(service).adapters)
    assert list(means[0]) == list(means[1])
    assert torch.equal(codec.decode_named(means[1], {"x": (3,)})["x"], torch.full((3,), 3.0))


def test_where_all_weigh_alike_nobody_claims_more_than_one(tmp_path: Path) -> None:
    service = root({"weights": "equal"}, tmp_path)
    plans(service, GOOD, BAD, "third")
    with pytest.raises(ProtocolError, match="by the recipe it is 1 at most"):
        service.handle(BAD, change(1e6, 1.5))
    results([service.handle(name, change(3.0, 1.0)) for name in (GOOD, BAD, "third")])
    assert current(service).completed == 1


OWN_ROWS = [{"name": name, "train": "x.jsonl", "most_rows": rows} for name, rows in ((GOOD, 40), (BAD, 3))]


def test_with_passes_a_silo_weighs_no_more_than_its_own_rows_may(tmp_path: Path) -> None:
    """Where the recipe says how many each has: a small silo does not pass for a large one."""
    service = root({}, tmp_path, {"epochs": 3}, silo=OWN_ROWS)
    plans(service, GOOD, BAD)
    with pytest.raises(ProtocolError, match=r"bad claims the weight 97 .* it is 96 at most"):
        service.handle(BAD, change(1e6, 97.0))
    results([service.handle(GOOD, change(1.0, 960.0)), service.handle(BAD, change(12.0, 96.0))])
    assert codec.decode_named(current(service).adapters, {"x": (3,)})["x"].tolist() == [2.0] * 3


def test_with_passes_and_no_word_of_the_recipes_a_weight_is_bounded_all_the_same(tmp_path: Path) -> None:
    service = root({}, tmp_path, {"epochs": 3})
    plans(service, GOOD, BAD, "third")
    most = 3 * 100_000 / 2 * 32 / 2
    with pytest.raises(ProtocolError, match=re.escape(f"it is {most:g} at most")):
        service.handle(BAD, change(1e6, most + 1))
    results([service.handle(name, change(3.0, most)) for name in (GOOD, BAD, "third")])
    assert current(service).completed == 1


def test_with_passes_and_masks_no_update_brings_a_weight(tmp_path: Path) -> None:
    """A silo counts for the share of its rows that it trained on, in the sum, which holds 1 of each at most."""
    silos = [GOOD, BAD, "third", "d", "e", "f"]
    edges = [{**edge, "silos": silos[at : at + 3]} for edge, at in zip(EDGES, (0, 3), strict=True)]
    service = root({"secure": {"masks": True}}, tmp_path, PASSES, silos=silos, edge=edges)
    results([service.handle(edge["name"], pb.Ready(silos=edge["silos"])) for edge in edges])
    with pytest.raises(ProtocolError, match="masked"):
        service.handle("left", change(1e6, 1.0))
    with pytest.raises(ProtocolError, match="claims 4 silos for its sum, it has named 3"):
        service.handle("left", pb.Update(round=1, masked=b"x", silos=4))
    with pytest.raises(FrameError, match="a weight beside a masked update"):
        checked(wrap(pb.Update(round=1, masked=b"x", weight=1.0)))
    results([service.handle(name, pb.Update(round=1)) for name in ("left", "right")])
    assert current(service).completed == 1


CLAIMED = (pb.Steps(count=4, before=0, total=9), pb.Steps(count=2**30, before=0, total=2**31 + 1))


@pytest.mark.parametrize("steps", CLAIMED, ids=["one row more", "2^31"])
def test_with_passes_no_more_steps_are_begun_than_its_rows_make(steps: pb.Steps, model: Path, tmp_path: Path) -> None:
    """Everybody's learning rate follows the silo with most."""
    train = {**PASSES, "rounds": 2, "batch": BATCH, "max_tokens": LONGEST}
    drill = Drill(recipe_of(model, silos=(GOOD, BAD), train=train, gather=0.0), tmp_path)
    begins = {
        name: pb.Begin(round=1, participants=(GOOD, BAD), steps=pb.Steps(count=3, total=6)) for name in drill.silos
    }
    with pytest.raises(ProtocolError, match=f"bad claims {steps.total:,} steps.*the 4 rows.* make 6") as caught:
        drill.silos[BAD].channel.call(pb.Begin(round=1, participants=(GOOD, BAD), steps=steps))
    assert "train.most_rows" in caught.value.remedy
    results([drill.silos[name].channel.submit(begin) for name, begin in begins.items()])
    drill.service.stop()


EDGES = [
    {"name": "left", "address": "localhost:1", "silos": [GOOD, BAD]},
    {"name": "right", "address": "localhost:2", "silos": ["third"]},
]


@pytest.mark.parametrize("train", [STEPS, PASSES], ids=["steps", "passes"])
def test_an_edges_sum_weighs_no_more_than_the_silos_that_may_be_below_it(train: dict[str, Any], tmp_path: Path) -> None:
    service = root({}, tmp_path, train, edge=EDGES)
    results([service.handle("left", pb.Ready(silos=[GOOD, BAD])), service.handle("right", pb.Ready(silos=["third"]))])
    with pytest.raises(ProtocolError, match=r"left claims the weight 193 .* it is 192 at most"):
        service.handle("left", change(1.0, 193.0))
    results([service.handle("left", change(1.0, 192.0)), service.handle("right", change(1.0, 96.0))])
    assert current(service).completed == 1


@pytest.mark.parametrize("claim", [in_a_round, in_an_open_round])
def test_a_gradient_of_any_length_counts_for_as_much_as_the_longest_that_may_be(claim: Claim, build: Build) -> None:
    """And honest ones that are shorter step exactly as without the bound."""
    longest, moved = 0.5, {}
    for times in (1e-9, 1.0, 1e6, 1e12):
        drill = build(max_silo_norm=longest)
        good, bad = begun(drill, claim)
        before = drill.adapter()
        good.work(GOODS)
        bad.forward(BADS).result(WAIT)
        bad.backward(bad.last, BADS, times=times).result(WAIT)
        results([claim(good, 8.0), claim(bad, 4.0)])
        after = drill.adapter()
        moved[times] = torch.cat([(after[name] - before[name]).flatten() for name in before])
    apart = [float((moved[times] - moved[1e-9]).norm()) for times in (1.0, 1e6, 1e12)]
    assert apart[1] == pytest.approx(apart[2], rel=1e-3)
    assert max(apart) <= 1.001 * 0.1 * longest * 4 / 12  # the rate, the bound, its share of the tokens


def test_gradients_within_the_bound_are_left_as_they_are(build: Build) -> None:
    adapters = []
    for bound in (None, 1e6):
        drill = build(max_silo_norm=bound)
        good, bad = begun(drill, in_a_round)
        for step in (1, 2):
            good.work(GOODS)
            bad.work(BADS)
            results([good.commit(step, 8.0), bad.commit(step, 4.0)])
        adapters.append(drill.adapter())
    assert all(torch.equal(adapters[1][name], tensor) for name, tensor in adapters[0].items())
