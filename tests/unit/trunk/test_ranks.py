"""Rank 0 and another process: what is sent arrives, and an order that fails leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part
from isthmus.model.device import CPU
from isthmus.recipe import Recipe
from isthmus.trunk.loading import load_trunk
from isthmus.trunk.ranks import Order, give, take
from isthmus.trunk.runner import Runner
from isthmus.trunk.staged_runner import StagedRunner
from tests.conftest import make_recipe
from tests.unit.trunk.ranks import Others, started

pytestmark = pytest.mark.process


@pytest.fixture
def others(tmp_path: Path) -> Iterator[Others]:
    with started(2, tmp_path) as found:
        yield found


def staged(recipe: Recipe, others: Others, cut: Cut) -> StagedRunner:
    ranks = others.use(recipe)
    ranks.load(cut)
    part = load_trunk(Checkpoint(recipe.model.path), cut, recipe, CPU, ranks.share)
    ranks.wait_loaded()
    return StagedRunner(part, ranks)


def test_an_order_that_fails_is_the_requests_error_and_the_next_is_answered(
    others: Others, model: Path, tmp_path: Path
) -> None:
    """Also by another cut, which the ranks load."""
    recipe = make_recipe(model)
    for cut in (Cut(1, 1), Cut(2, 1), Cut(1, 2)):
        runner = staged(recipe, others, cut)
        h_TD = torch.randn(4, runner.width)
        with torch.no_grad():
            before = runner.full_pass(h_TD, [4])
        wrong = {"lengths": [4], "passed": [(0, 9)], "past": [4], "ends": None, "caches": [77]}
        with pytest.raises(RuntimeError, match="rank 1: ") as caught:
            runner._stages[0].cached(wrong, h_TD)
        assert not isinstance(caught.value, torch.OutOfMemoryError)
        with torch.no_grad():
            assert torch.equal(runner.full_pass(h_TD, [4]), before)


def test_tensors_arrive_as_they_are(others: Others, model: Path) -> None:
    """Views, 16 bits, and no numbers at all; no sequence passes a block, so that what comes back is what was sent."""
    recipe = make_recipe(model, model={"dtype": "bfloat16"})
    runner = staged(recipe, others, Cut(1, 1))
    words = {"lengths": [2], "passed": [(0, 0)], "masks": [], "segments": None, "own": False}
    for h_TD in (
        torch.randn(2, runner.width),
        torch.randn(runner.width, 2).T,
        torch.randn(2, 2 * runner.width)[:, ::2],
    ):
        give(1, {"order": Order.FULL, "tidy": [], **words}, [h_TD.to(torch.bfloat16)])
        said, (found,) = take(1, timedelta(seconds=60))
        assert (said, found.dtype) == ({}, torch.bfloat16)
        assert torch.equal(found, h_TD.to(torch.bfloat16))
    give(1, {"order": Order.FULL, "tidy": [], **words, "lengths": [0]}, [torch.empty(0, runner.width)])
    said, (found,) = take(1, timedelta(seconds=60))
    assert (said, found.shape) == ({}, (0, runner.width))


@torch.inference_mode()
def test_a_sequence_that_passes_none_of_a_ranks_blocks_may_share_its_passes(others: Others, model: Path) -> None:
    """Some of its tokens have never been at that rank."""
    with torch.inference_mode(False):
        recipe = make_recipe(model)
        runner, whole = staged(recipe, others, Cut(1, 1)), Runner(load_trunk_alone(recipe))
    h_TD = torch.randn(6, runner.width)
    for one in (first := [each.cache_of(range(1)) for each in (whole, runner)]):
        one.reserve(6)
    both = [[cache, each.cache_of(range(3))] for cache, each in zip(first, (whole, runner), strict=True)]
    for caches, lengths in (([[one] for one in first], [4]), (both, [1, 5]), (both, [2, 1])):
        tokens = h_TD[: sum(lengths)]
        expected, found = (
            each.cached_pass(tokens, lengths, own) for each, own in zip((whole, runner), caches, strict=True)
        )
        assert torch.equal(found, expected)


def load_trunk_alone(recipe: Recipe) -> Part:
    return load_trunk(Checkpoint(recipe.model.path), Cut(1, 1), recipe, CPU)
