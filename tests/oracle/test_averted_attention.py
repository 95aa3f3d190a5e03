"""Attention that turns away from sensitive tokens equals a loop over queries and keys, in every family and way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part
from isthmus.privacy.averted_attention import averted_hidden
from tests.oracle.conftest import Models
from tests.oracle.twins import FAMILIES, Inputs, distance, ragged

BLOCKS = 3
SLOW = "slow_averted"


def slow_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    a_BP: torch.Tensor,
    softcaps: bool,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """One query and one key at a time."""
    batch, heads, new, _ = query.shape
    keys, past = key.shape[2], key.shape[2] - new
    output = torch.zeros(batch, new, heads, value.shape[3])
    for row, head, place in ((r, h, q) for r in range(batch) for h in range(heads) for q in range(new)):
        kv = head * key.shape[1] // heads
        logits = []
        for other in range(keys):
            logit = float(query[row, head, place] @ key[row, kv, other]) * settings["scaling"]
            cap = settings.get("softcap")
            logit = cap * math.tanh(logit / cap) if cap and softcaps else logit
            here = other == past + place
            averted = 0.0 if here else float(a_BP[row, a_BP.shape[1] - keys + other])
            logits.append(logit - averted + float(mask[row, 0, place, other]))
        output[row, place, head] = torch.tensor(logits).softmax(dim=0) @ value[row, kv]
    return output, None


def slow(part: Part, a_BP: torch.Tensor, **inputs: Any) -> torch.Tensor:
    AttentionInterface.register(SLOW, slow_attention)
    AttentionMaskInterface.register(SLOW, eager_mask)
    own = part.config._attn_implementation
    part.config._attn_implementation = SLOW
    try:
        return part.hidden(**inputs, a_BP=a_BP, softcaps=own == "eager")
    finally:
        part.config._attn_implementation = own


@pytest.fixture(scope="module", params=(*FAMILIES, "deepseek_v3", "llama4_text"))
def bottom(request: pytest.FixtureRequest, models: Models) -> Part:
    return load_part(Checkpoint(str(models(request.param))), Cut(BLOCKS, 1), "bottom")


def inputs_of(side: str, lengths: tuple[int, ...] = (3, 24, 19)) -> Inputs:
    batch = ragged(side, lengths=lengths)
    return {key: value for key, value in batch.items() if key != "labels"}


def aversions(batch: Inputs) -> torch.Tensor:
    draw = torch.Generator().manual_seed(4)
    a_BP = 5.0 * torch.rand(batch["input_ids"].shape, generator=draw)
    return a_BP * (torch.rand(a_BP.shape, generator=draw) < 0.4)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_it_equals_the_slow_loop(bottom: Part, side: str) -> None:
    """Some rows are longer than the sliding windows of 16."""
    batch = inputs_of(side)
    a_BP, real = aversions(batch), batch["attention_mask"].bool()
    fast = averted_hidden(bottom, a_BP, **batch, use_cache=False)
    assert distance(fast[real], slow(bottom, a_BP, **batch, use_cache=False)[real]) < 1e-5
    assert distance(fast[real], bottom.hidden(**batch, use_cache=False)[real]) > 1e-2


@torch.no_grad()
def test_with_a_cache_it_gives_what_it_gives_without(bottom: Part) -> None:
    """In steps of several tokens and of one."""
    batch = inputs_of("left")
    a_BP, real = aversions(batch), batch["attention_mask"].bool()
    whole = averted_hidden(bottom, a_BP, **batch, use_cache=False)
    cache, pieces = DynamicCache(config=bottom.config), []
    for start, end in ((0, 9), (9, 20), (20, 21), (21, 22), (22, 24)):
        piece = {key: value[:, start:end] for key, value in batch.items()}
        piece["attention_mask"] = batch["attention_mask"][:, :end]
        pieces.append(averted_hidden(bottom, a_BP[:, :end], **piece, past_key_values=cache, use_cache=True))
    assert distance(torch.cat(pieces, dim=1)[real], whole[real]) < 1e-5


@torch.no_grad()
def test_without_aversion_it_is_plain_attention_bit_for_bit(bottom: Part) -> None:
    batch = inputs_of("left")
    plain = bottom.hidden(**batch, use_cache=False)
    assert torch.equal(averted_hidden(bottom, None, **batch, use_cache=False), plain)
    assert torch.equal(averted_hidden(bottom, torch.zeros(3, 24), **batch, use_cache=False), plain)
    averted_hidden(bottom, aversions(batch), **batch, use_cache=False)
    assert torch.equal(bottom.hidden(**batch, use_cache=False), plain), "the part is as it was"


@torch.no_grad()
def test_an_averted_token_changes_others_less(bottom: Part) -> None:
    """Of a very averted token nothing reaches other positions, while its own position still depends on it."""
    ids = inputs_of("left", (12,))["input_ids"]
    other = ids.clone()
    other[0, 5] = 4 + (int(ids[0, 5]) - 3) % 90
    a_BP = torch.zeros(ids.shape)
    a_BP[0, 5] = 1e4

    def moved(a: torch.Tensor | None) -> torch.Tensor:
        first, second = (averted_hidden(bottom, a, input_ids=one, use_cache=False)[0] for one in (ids, other))
        return (first - second).norm(dim=1)

    plain, averted = moved(None), moved(a_BP)
    assert (plain[5:] > 0).all()
    assert averted[5] > 0
    assert averted[6:].max() == 0


def test_gradients_pass(bottom: Part) -> None:
    batch = inputs_of("left")
    h_BLD = bottom.family.backbone_of(bottom.model).get_submodule("embed_tokens")(batch.pop("input_ids"))
    h_BLD.requires_grad_(True)
    averted_hidden(bottom, torch.ones(3, 24), inputs_embeds=h_BLD, **batch, use_cache=False).sum().backward()
    assert h_BLD.grad is not None
    assert h_BLD.grad.isfinite().all()
    assert h_BLD.grad.abs().max() > 0
