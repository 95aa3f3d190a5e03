"""Averted attention: plain where nothing is averted, one pass at a time, and the part's own attention afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part
from isthmus.privacy.averted_attention import averted_hidden
from tests.conftest import save_tiny_model

LENGTH = 6


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return load_part(Checkpoint(str(save_tiny_model("llama", tmp_path_factory.mktemp("model")))), Cut(1, 1), "trunk")


def inputs() -> dict[str, Any]:
    h_BLD = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(0))
    return {"inputs_embeds": h_BLD, "use_cache": False}


def averted(*places: int, by: float = 1e4) -> torch.Tensor:
    a_BP = torch.zeros(1, LENGTH)
    a_BP[0, list(places)] = by
    return a_BP


@torch.no_grad()
def test_without_aversion_it_is_the_parts_own(part: Part) -> None:
    plain = part.hidden(**inputs())
    for nothing in (None, averted()):
        assert torch.equal(averted_hidden(part, nothing, **inputs()), plain)


@torch.no_grad()
def test_an_averted_token_reaches_no_later_one_and_sees_itself(part: Part) -> None:
    given = inputs()
    before = averted_hidden(part, averted(2), **given)
    changed = given["inputs_embeds"].clone()
    changed[0, 2] += 1.0
    after = averted_hidden(part, averted(2), **{**given, "inputs_embeds": changed})
    same = [torch.allclose(before[0, place], after[0, place], atol=1e-6) for place in range(LENGTH)]
    assert same == [True, True, False, True, True, True]


def test_the_parts_attention_is_its_own_afterwards_even_if_the_pass_fails(part: Part) -> None:
    own = part.config._attn_implementation
    with pytest.raises(ValueError, match="input_ids"):
        averted_hidden(part, averted(2), input_ids=None, inputs_embeds=None)
    assert part.config._attn_implementation == own
