"""Passes of one token a sequence through fixed pages and buffers compute what a pass over any lengths computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, load_part
from isthmus.recipe import LoraSection
from isthmus.trunk.attention_plan import plan_attention
from isthmus.trunk.paged_cache import FIRST_PAGES, PAGE, PagedCache
from isthmus.trunk.runner import Runner
from isthmus.trunk.token_passes import recordable
from tests.conftest import save_tiny_model, targets_of
from tests.oracle.twins import distance, random_b

WIDTH = 32
TOLERANCE = 1e-5
FAMILIES = ("llama", "mistral", "qwen3", "olmo2")


def runner_of(folder: Path, family: str, *, record: bool) -> Runner:
    part = load_part(Checkpoint(str(folder)), Cut(1, 1), "trunk")
    adapters.add_adapter(part, LoraSection(rank=4, targets=tuple(targets_of(family))), 0, freeze_a=False)
    adapters.load_adapter(part, random_b(adapters.adapter_of(part)))
    return Runner(part, record=record)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, Runner]:
    """A runner with recorded passes, and one without."""
    folder = save_tiny_model(request.param, tmp_path_factory.mktemp(request.param), initializer_range=0.3)
    return runner_of(folder, request.param, record=True), runner_of(folder, request.param, record=False)


def hidden(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=10, deadline=None)
@given(prompts=st.lists(st.integers(1, 2 * PAGE), min_size=1, max_size=5), data=st.data())
def test_tokens_of_any_sequences_equal_a_pass_over_any_lengths(
    pair: tuple[Runner, Runner], prompts: list[int], data: st.DataObject
) -> None:
    """Prompts, then tokens of some sequences in any order, a crop, a copy, and a pass of mixed lengths between."""
    caches = [[runner.new_cache() for _ in prompts] for runner in pair]
    for seed in range(4):
        lengths, chosen = prompts, list(range(len(prompts)))
        if seed:
            chosen = data.draw(st.lists(st.sampled_from(chosen), min_size=1, unique=True), label="sequences")
            mixed = data.draw(st.booleans(), label="mixed")
            lengths = [2 if mixed and place == 0 else 1 for place in range(len(chosen))]
        with torch.inference_mode():
            h_TD = hidden(sum(lengths), seed)
            got, expected = (
                runner.cached_pass(h_TD, lengths, [own[number] for number in chosen])
                for runner, own in zip(pair, caches, strict=True)
            )
        assert distance(got, expected) <= TOLERANCE
        for own in caches:
            own[0].crop(max(1, own[0].length - seed))
            own[-1] = own[-1].copy()
    assert all(isinstance(cache, PagedCache) for cache in caches[0])


def test_what_was_recorded_is_recorded_again_once_the_pool_has_grown(pair: tuple[Runner, Runner]) -> None:
    caches = [[runner.new_cache()] for runner in pair]
    more = []
    for tokens in (3, 1, 1):
        with torch.inference_mode():
            got, expected = (
                runner.cached_pass(hidden(tokens, tokens), [tokens], own)
                for runner, own in zip(pair, caches, strict=True)
            )
        assert distance(got, expected) <= TOLERANCE
        more.append(pair[0].new_cache())
        more[-1].reserve(FIRST_PAGES * PAGE * 2 ** len(more))


def test_experts_and_rope_by_length_are_not_recorded(tmp_path: Path) -> None:
    part = load_part(Checkpoint(str(save_tiny_model("llama", tmp_path))), Cut(1, 1), "trunk")
    plan = plan_attention(part)
    assert recordable(part, plan)
    assert not recordable(part, replace(plan, attention="eager"))
    assert not recordable(part, replace(plan, value_width=plan.key_width + 1))
    part.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not recordable(part, plan)
    experts = load_part(Checkpoint(str(save_tiny_model("qwen3_moe", tmp_path / "experts"))), Cut(1, 1), "trunk")
    assert not recordable(experts, plan_attention(experts))
