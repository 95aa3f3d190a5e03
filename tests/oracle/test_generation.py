"""``generate`` of transformers, in all its ways, gives on the split model what it gives on the uncut one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from isthmus.privacy.events import Release
from tests.conftest import make_recipe, uncut
from tests.oracle.conftest import BuildTwins, Models
from tests.oracle.twins import CUTS, FAMILIES, Inputs, Twins, make_twins, prompts

LENGTH, SHORT = 200, 60
"""Tokens of an answer at one cut of each family, and at its others: more than the sliding windows' 16 in any case."""
GREEDY = [(family, cut) for family in FAMILIES for cut in CUTS]
CACHES = ("llama", "mistral", "qwen3", "gemma2")
"""Families with full attention, with sliding windows, and with both in one model, in either order."""
Answers = Callable[[str], torch.Tensor]


def generate(model: PreTrainedModel, inputs: Inputs, length: int, **settings: Any) -> torch.Tensor:
    """Prompts and exactly this many further tokens."""
    torch.manual_seed(3)
    return model.generate(**inputs, min_new_tokens=length, max_new_tokens=length, **settings)


def crossed(twins: Twins) -> list[int]:
    """Tokens of each frame that left the silo for the trunk."""
    releases: list[Release] = twins.boundary.ledger.releases
    return [release.rows for release in releases]


@pytest.fixture(scope="module")
def whole_answer(build: BuildTwins) -> Answers:
    """The uncut model's greedy tokens; twins of one family have the same adapters at every cut."""

    @cache
    def answer(family: str) -> torch.Tensor:
        twins = build(family, (1, 1))
        twins.close()
        return generate(twins.whole, prompts(), LENGTH, do_sample=False)

    return answer


@pytest.mark.parametrize(("family", "cut"), GREEDY)
def test_greedy_tokens(family: str, cut: tuple[int, int], twins_of: BuildTwins, whole_answer: Answers) -> None:
    twins, length = twins_of(family, cut), LENGTH if cut == CUTS[0] else SHORT
    tokens = generate(twins.split, prompts(), length, do_sample=False)
    assert tokens.shape == (3, 40 + length)
    assert torch.equal(tokens, whole_answer(family)[:, : 40 + length])
    assert crossed(twins) == [3 + 40 + 23] + [3] * (length - 1)  # the prompts once, then one vector a row and step


@pytest.mark.parametrize("family", CACHES)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"do_sample": True, "temperature": 1.5, "num_return_sequences": 2}, id="samples"),
        pytest.param({"do_sample": False, "num_beams": 3, "num_return_sequences": 2}, id="beams"),
        pytest.param({"do_sample": False, "use_cache": False}, id="without-cache"),
    ],
)
def test_batches(family: str, settings: dict[str, Any], twins_of: BuildTwins) -> None:
    split, whole = (generate(model, prompts(), 20, **settings) for model in twins_of(family, (1, 2)).both)
    assert torch.equal(split, whole)


@pytest.mark.parametrize("family", CACHES)
def test_prompt_lookup(family: str, twins_of: BuildTwins) -> None:
    twins = twins_of(family, (2, 1))
    inputs = {key: value.repeat(1, 3) for key, value in prompts((9,)).items()}
    split, whole = (generate(model, inputs, 24, prompt_lookup_num_tokens=4, do_sample=False) for model in twins.both)
    assert torch.equal(split, whole)
    assert max(crossed(twins)[1:]) > 1


def test_drafts_end_where_the_context_does(models: Models, tmp_path: Path) -> None:
    """Looked-up tokens may reach beyond the last token that is asked for; the trunk takes none beyond the context."""
    twins = make_twins(make_recipe(models("llama", max_position_embeddings=40)), tmp_path)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8] * 9]), "attention_mask": torch.ones(1, 36, dtype=torch.long)}
    split, whole = (generate(model, inputs, 4, prompt_lookup_num_tokens=5, do_sample=False) for model in twins.both)
    assert torch.equal(split, whole)
    twins.close()


@pytest.mark.parametrize("family", CACHES)
@pytest.mark.parametrize("helper", ["base", "stranger"])
def test_assistant_model(family: str, helper: str, twins_of: BuildTwins, models: Models) -> None:
    """The base model without adapters guesses often right; a model of other weights and fewer blocks seldom."""
    twins = twins_of(family, (1, 1))
    config = {} if helper == "base" else {"seed": 5, "blocks": 2}
    split, whole = (
        generate(model, prompts((21,)), 20, assistant_model=uncut(models(family, **config)), do_sample=False)
        for model in twins.both
    )
    assert torch.equal(split, whole)
    assert max(crossed(twins)[1:]) > 1
    assert sum(crossed(twins)) > 21 + 20, "no guess was wrong: nothing had to be forgotten"
