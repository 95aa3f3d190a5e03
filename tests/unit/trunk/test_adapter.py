"""The trunk's adapters: one that all silos step by their weighted mean, or each its own, averaged now and then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part
from isthmus.recipe import LoraSection, TrainSection
from isthmus.trunk.adapter import ReplicaAdapters, SharedAdapter, TrunkAdapter, full_adapter
from tests.conftest import save_tiny_model

RATE, EVERY, STEPS = 0.5, 2, 5
TRAIN = TrainSection(optimizer="sgd", learning_rate=RATE, steps=STEPS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def part(folder: Path) -> Part:
    made = load_part(Checkpoint(str(folder)), Cut(1, 1), "trunk")
    adapters.add_adapter(made, LoraSection(rank=2), 0, freeze_a=True)
    adapters.load_adapter(made, {name: torch.zeros_like(one) for name, one in adapters.adapter_of(made).items()})
    return made


def gradients(part: Part, value: float) -> list[torch.Tensor]:
    return [torch.full_like(one, value) for one in adapters.trainable(part).values()]


def value(adapter: TrunkAdapter, silo: str) -> float:
    """All of a silo's numbers, which are alike in these tests."""
    (found,) = {float(one) for leaf in adapter.leaves(silo).values() for one in leaf.detach().unique()}
    return found


def test_a_shared_step_takes_the_weighted_mean(part: Part) -> None:
    shared = SharedAdapter(part, TRAIN)
    before = shared.version("a")
    shared.step({"a": (1.0, gradients(part, 4.0)), "b": (3.0, gradients(part, 8.0))}, together=True)
    assert value(shared, "a") == value(shared, "b") == -RATE * 7.0
    assert shared.version("a") != before


def test_a_shared_step_of_no_weight_moves_nothing(part: Part) -> None:
    shared = SharedAdapter(part, TRAIN)
    shared.step({"a": (0.0, gradients(part, 4.0))}, together=True)
    assert value(shared, "a") == 0.0
    shared.step({"a": (1.0, None), "b": (1.0, gradients(part, 4.0))}, together=True)
    assert value(shared, "a") == -RATE * 2.0, "who has no gradient counts with zero"


def test_replicas_step_alone_and_meet_by_weight(part: Part) -> None:
    replicas = ReplicaAdapters(part, TRAIN, EVERY)
    assert [replicas.steps_together(step) for step in range(1, 7)] == [False, True, False, True, True, True]
    replicas.step({"a": (1.0, gradients(part, 4.0))}, together=False)
    replicas.step({"b": (3.0, gradients(part, 8.0))}, together=False)
    assert (value(replicas, "a"), value(replicas, "b")) == (-RATE * 4.0, -RATE * 8.0)
    replicas.step({"a": (0.0, None), "b": (0.0, None)}, together=True)
    assert value(replicas, "a") == value(replicas, "b") == -RATE * (4.0 + 3 * 8.0) / 4
    assert {float(one) for tensor in adapters.trainable(part).values() for one in tensor.detach().unique()} == {
        -RATE * 7.0
    }


def test_a_round_drops_what_was_not_averaged(part: Part) -> None:
    replicas = ReplicaAdapters(part, TRAIN, EVERY)
    replicas.step({"a": (1.0, gradients(part, 4.0))}, together=False)
    replicas.begin()
    assert value(replicas, "a") == 0.0


@pytest.mark.parametrize("kind", ["shared", "replica"])
def test_a_stopped_one_goes_on_and_versions_tell(part: Part, kind: str) -> None:
    def made() -> TrunkAdapter:
        return SharedAdapter(part, TRAIN) if kind == "shared" else ReplicaAdapters(part, TRAIN, EVERY)

    adapter, again = made(), made()
    again.leaves("a")
    before = again.version("a")
    adapter.step({"a": (1.0, gradients(part, 4.0))}, together=True)
    again.load(adapter.state())
    assert value(again, "a") == value(adapter, "a") == -RATE * 4.0
    assert again.version("a") != before


def test_a_full_adapter_has_the_frozen_tensors_too(part: Part) -> None:
    leaves = SharedAdapter(part, TRAIN).leaves("a")
    full = full_adapter(part, leaves)
    assert full.keys() == adapters.adapter_of(part).keys() > leaves.keys()


def test_gradients_for_other_tensors_are_refused(part: Part) -> None:
    replicas = ReplicaAdapters(part, TRAIN, EVERY)
    with pytest.raises(ValueError, match="zip"):
        replicas.step({"a": (1.0, gradients(part, 4.0)[:-1])}, together=False)


@pytest.mark.parametrize("kind", ["shared", "replica"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_round_file_of_16_bit_adapters_is_read_into_fp32(part: Part, kind: str, dtype: torch.dtype) -> None:
    """As versions wrote whose adapters had the base's type; Adam goes on from its moments in fp32."""
    train = TrainSection(learning_rate=RATE, steps=STEPS)

    def made() -> TrunkAdapter:
        return SharedAdapter(part, train) if kind == "shared" else ReplicaAdapters(part, train, EVERY)

    def narrowed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: narrowed(one) for key, one in value.items()}
        return value.to(dtype) if torch.is_tensor(value) and value.ndim else value

    adapter = made()
    adapter.step({"a": (1.0, gradients(part, 4.0))}, together=True)
    state = narrowed(adapter.state())
    again = made()
    again.load(state)
    assert value(again, "a") == pytest.approx(value(adapter, "a"), rel=1e-2)
    again.step({"a": (1.0, gradients(part, 4.0))}, together=True)
    found = again.state()
    optimizer = found["optimizer"] if kind == "shared" else found["optimizers"]["a"]
    tensors = [*found["adapter"].values(), *(one for own in optimizer["state"].values() for one in own.values())]
    assert {one.dtype for one in tensors} == {torch.float32}


@pytest.mark.parametrize("kind", ["shared", "replica"])
def test_a_step_has_its_rate_decay_and_largest_norm(part: Part, kind: str) -> None:
    train = TrainSection(optimizer="sgd", learning_rate=RATE, steps=STEPS, max_grad_norm=1.0)
    adapter = SharedAdapter(part, train) if kind == "shared" else ReplicaAdapters(part, train, EVERY)
    count = sum(one.numel() for one in adapters.trainable(part).values())
    adapter.step({"a": (1.0, gradients(part, 4.0))}, together=True, rate=0.25)
    assert value(adapter, "a") == pytest.approx(-0.25 / count**0.5, rel=1e-5)
    adapter.step({"a": (1.0, gradients(part, 4.0))}, together=True)
    assert value(adapter, "a") == pytest.approx(-(0.25 + RATE) / count**0.5, rel=1e-5)
