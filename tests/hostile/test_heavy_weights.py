"""A silo that claims to weigh more than its work takes no more of a step, or of a round, than its tokens give it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import FrameError, IsthmusError, ProtocolError
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer
from tests.conftest import save_tiny_model
from tests.unit.trunk.drill import Drill, Silo, Work, recipe_of, results, tensors_of
from tests.unit.trunk.talk import WAIT

GOOD, BAD = "good", "bad"
GOODS: Work = (1, (3, 5))
BADS: Work = (2, (4,))
BATCH, LONGEST = 2, 16
HEAVY = (1e300, 1e9, 33.0, 4.5)
"""More than four tokens; of the third not even the recipe's batch has so many."""
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
