"""A trunk in few bits: the split model is the uncut one whose middle blocks have the same rounded weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from isthmus.silo.trainer import train_step
from isthmus.trunk.rounded_linear import kind_of
from tests.conftest import needs_bits
from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import FAMILIES, Twins, batch_of, distance, lora_of, ragged

pytestmark = pytest.mark.usefixtures("bitsandbytes")
ROUNDING = 0.02
"""Relative: results of a layer have 8 bits."""
WEIGHTS = pytest.mark.parametrize("weights", ["int8", "int4", pytest.param("nf4", marks=needs_bits)])


def sections(weights: str) -> dict[str, Any]:
    return {"trunk": {"weights": weights}, "train": {"optimizer": "sgd", "learning_rate": 1e-2}}


def rounded(twins: Twins, weights: str) -> PeftModel:
    """The uncut model, in fp32, with the trunk's dequantized weights."""
    bottom, top = twins.split.bottom, twins.split.top
    blocks = range(len(list(bottom.model.model.layers)), top.first_block)
    for name, layer in twins.whole.named_modules():
        found = [int(piece) for piece in name.split(".") if piece.isdigit()]
        if type(layer) is nn.Linear and "lora_" not in name and found and found[0] in blocks:
            kind = kind_of(weights, name.removesuffix(".base_layer"), *layer.weight.shape)
            assert kind is not None
            layer.weight.data = kind(layer).weight
    return twins.whole


@WEIGHTS
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_steps(weights: str, family: str, twins_of: BuildTwins) -> None:
    twins = twins_of(family, (1, 2), sections=sections(weights), vivid=False)
    inputs = ragged("left")
    with torch.no_grad():
        plain, whole = twins.whole(**inputs).logits, rounded(twins, weights)
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
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_cached_token_is_as_one_of_a_whole_pass(weights: str, family: str, twins_of: BuildTwins) -> None:
    """Whatever the pass, a layer computes the same: tokens do not change where a cache begins."""
    twins = twins_of(family, (1, 2), sections=sections(weights))
    ids = torch.randint(4, 40, (1, 12))
    answers = [
        twins.split.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(*answers)
