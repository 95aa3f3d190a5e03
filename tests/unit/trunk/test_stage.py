"""A stage answers as its blocks would in the trunk alone, and keeps what rank 0 has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut
from isthmus.model.device import CPU
from isthmus.model.share import BlockShare
from isthmus.recipe import Recipe
from isthmus.trunk.loading import load_trunk
from isthmus.trunk.ranks import Order
from isthmus.trunk.runner import Runner
from isthmus.trunk.stage import Stage, load_stage, stage_adapter
from tests.conftest import make_recipe
from tests.oracle.twins import save_vivid_model

LENGTHS = [3, 5]
PASSED = [(2, 5), (2, 4)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_recipe(save_vivid_model("llama", tmp_path_factory.mktemp("model"), blocks=7))


@pytest.fixture
def whole(recipe: Recipe) -> Runner:
    """The trunk's five blocks, with an adapter that has moved."""
    part = load_trunk(Checkpoint(recipe.model.path), Cut(1, 1), recipe, CPU)
    draw = torch.Generator().manual_seed(1)
    moved = {name: torch.randn(one.shape, generator=draw) / 9 for name, one in adapters.adapter_of(part).items()}
    adapters.load_adapter(part, moved)
    return Runner(part)


@pytest.fixture
def stage(recipe: Recipe) -> Stage:
    """Blocks 2 to 4."""
    return load_stage(Checkpoint(recipe.model.path), recipe, CPU, BlockShare(1, 2), Cut(1, 1))


def own(whole: Runner) -> list[torch.Tensor]:
    return [one.detach() for one in stage_adapter(whole.part, range(2, 5)).values()]


def words(order: Order, **more: Any) -> dict[str, Any]:
    return {"order": order, "tidy": [], "own": False, "lengths": LENGTHS, "passed": PASSED, **more}


def inputs(whole: Runner) -> torch.Tensor:
    return torch.randn(sum(LENGTHS), whole.width, generator=torch.Generator().manual_seed(2))


def test_its_adapter_is_that_of_its_blocks(whole: Runner) -> None:
    names = stage_adapter(whole.part, range(2, 5))
    assert {adapters.block_of(whole.part, name) for name in names} == {3, 4, 5}, "by the uncut model's indices"
    assert list(names) == sorted(names)


@torch.inference_mode()
def test_a_pass_takes_the_adapter_that_came_last(whole: Runner, stage: Stage) -> None:
    h_TD, passed = inputs(whole), [range(*one) for one in PASSED]
    expected = whole.full_pass(h_TD, LENGTHS, passed=passed)
    before = stage.answer(words(Order.FULL, segments=None, masks=[]), [h_TD])[1][0]
    assert not torch.equal(before, expected)
    for tensors, told in (([h_TD, *own(whole)], True), ([h_TD], False)):
        answer = stage.answer(words(Order.FULL, own=told, segments=None, masks=[]), tensors)
        assert torch.equal(answer[1][0], expected)


def test_a_backward_is_that_of_its_pass(whole: Runner, stage: Stage) -> None:
    """With its own adapter, and with one that was given."""
    h_TD, g_TD = inputs(whole), inputs(whole).flip(0)
    names = stage_adapter(whole.part, range(2, 5))
    mine = {name: one.detach().clone().requires_grad_() for name, one in names.items()}
    other = {name: (one.detach() / 2).requires_grad_() for name, one in names.items()}
    x_TD = h_TD.clone().requires_grad_()
    passed = [range(*one) for one in PASSED]
    expected = whole.full_pass(x_TD, LENGTHS, [(3, mine), (5, other)], (None, None), passed)
    leaves = [x_TD, *mine.values(), *other.values()]
    gradients = torch.autograd.grad(expected, leaves, g_TD, allow_unused=True, materialize_grads=True)

    asked = words(Order.FULL, own=True, number=7, segments=[(3, True), (5, False)], masks=[None, None])
    told, found = stage.answer(asked, [h_TD, *own(whole), *(one.detach() for one in other.values())])
    assert torch.equal(found[0], expected)
    assert told["bytes"] > h_TD.nbytes
    _, (h_gradient_TD, flat) = stage.answer({"order": Order.BACKWARD, "tidy": [], "number": 7}, [g_TD])
    assert torch.equal(h_gradient_TD, gradients[0])
    assert torch.equal(flat, torch.cat([one.flatten() for one in gradients[1:]]))
    assert not stage._graphs


@torch.inference_mode()
def test_caches_are_dropped_back_copied_and_freed(whole: Runner, stage: Stage) -> None:
    h_TD, passed = inputs(whole), [range(*one) for one in PASSED]
    caches = [whole.cache_of(blocks) for blocks in passed]

    def ask(
        h_TD: torch.Tensor, lengths: list[int], numbers: list[int], past: list[int], tidy: Any = ()
    ) -> torch.Tensor:
        more = {"lengths": lengths, "caches": numbers, "past": past, "ends": None, "tidy": tidy}
        return stage.answer(words(Order.CACHED, own=True, **more), [h_TD, *own(whole)])[1][0]

    assert torch.equal(ask(h_TD, LENGTHS, [0, 1], [0, 0]), whole.cached_pass(h_TD, LENGTHS, caches))
    for cache in caches:
        cache.crop(2)
    twins = [cache.copy() for cache in caches]
    new_TD = h_TD[:2]
    found = ask(new_TD, [1, 1], [2, 3], [2, 2], [("copy", 0, 2), ("copy", 1, 3), ("copy", 99, 4), ("cache", 0)])
    assert torch.equal(found, whole.cached_pass(new_TD, [1, 1], twins))
    assert sorted(stage._caches) == [1, 2, 3]
    with pytest.raises(RuntimeError, match="cached positions are gone: 2 are needed, 0 are here"):
        ask(new_TD, [1, 1], [1, 4], [2, 2])
