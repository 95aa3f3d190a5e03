"""Trunk, or silo, in few bits: the split model is the uncut one in which the same weights are rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from isthmus.model.rounded_linear import FEW_TOKENS, Int8Linear, RoundedEmbedding, kind_of
from isthmus.silo.trainer import train_step
from tests.conftest import needs_bits
from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import FAMILIES, Twins, batch_of, distance, lora_of, ragged

pytestmark = pytest.mark.usefixtures("bitsandbytes")
ROUNDING = 0.02
"""Relative: results of a layer have 8 bits."""
WEIGHTS = pytest.mark.parametrize("weights", ["int8", "int4", pytest.param("nf4", marks=needs_bits)])


OWNERS = pytest.mark.parametrize("owner", ["trunk", "silo"])


def sections(weights: str, owner: str) -> dict[str, Any]:
    silo = {"name": "a", "train": "a.jsonl"}
    keys = {"trunk": {"weights": weights}} if owner == "trunk" else {"silo": [{**silo, "weights": weights}]}
    return {**keys, "train": {"optimizer": "sgd", "learning_rate": 1e-2}}


def rounded(twins: Twins, weights: str, owner: str) -> PeftModel:
    """The uncut model, in fp32, with the dequantized weights of the trunk, or of all else."""
    bottom, top = twins.split.bottom, twins.split.top
    middle = range(len(list(bottom.model.model.layers)), top.first_block)
    for name, layer in twins.whole.named_modules():
        found = [int(piece) for piece in name.split(".") if piece.isdigit()]
        if type(layer) is not nn.Linear or "lora_" in name:
            continue
        if not found and owner == "silo":  # the head
            layer.weight = nn.Parameter(Int8Linear(layer).weight)
        if found and (found[0] in middle) == (owner == "trunk"):
            kind = kind_of(weights, name.removesuffix(".base_layer"), *layer.weight.shape)
            assert kind is not None
            layer.weight.data = kind(layer).weight
    if owner == "silo":
        embedding = bottom.family.embedding_of(bottom.model)
        assert isinstance(embedding, RoundedEmbedding)
        twins.whole.get_input_embeddings().weight.data = embedding.weight
    return twins.whole


@WEIGHTS
@OWNERS
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_steps(weights: str, owner: str, family: str, twins_of: BuildTwins) -> None:
    twins = twins_of(family, (1, 2), sections=sections(weights, owner), vivid=False)
    inputs = ragged("left")
    with torch.no_grad():
        plain, whole = twins.whole(**inputs).logits, rounded(twins, weights, owner)
        split, expected = (model(**inputs, use_cache=False).logits for model in (twins.split, whole))
    real = inputs["attention_mask"].bool()
    assert distance(split[real], expected[real]) < ROUNDING
    assert not torch.equal(expected, plain)
    twins.rounds.begin(1, ["a"])
    optimizers = [
        torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-2) for model in twins.both
    ]
    before = {name: one.detach().clone() for name, one in lora_of(whole).items()}
    for number in range(1, 4):
        batch = batch_of(ragged("left", seed=number))
        losses = [train_step(model, own, batch) for model, own in zip(twins.both, optimizers, strict=True)]
        assert losses[0].loss == pytest.approx(losses[1].loss, rel=ROUNDING)
        twins.rounds.commit(1, number, losses[0].weight)
    after = lora_of(whole)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in sorted(before)])
    own = twins.split_adapter()
    also = torch.cat([(own[name] - before[name]).flatten() for name in sorted(before)])
    assert (moved - also).norm() < 5 * ROUNDING * moved.norm()


@WEIGHTS
@OWNERS
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_cached_token_is_as_one_of_a_whole_pass(weights: str, owner: str, family: str, twins_of: BuildTwins) -> None:
    """Of a few tokens a layer computes each by itself: they do not change where a cache begins."""
    twins = twins_of(family, (1, 2), sections=sections(weights, owner))
    ids = torch.randint(4, 40, (1, FEW_TOKENS - 8))
    answers = [
        twins.split.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(*answers)
