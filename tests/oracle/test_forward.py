"""Every family, every cut: the split model's logits, loss and adapter gradients are the uncut model's."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import CUTS, FAMILIES, Twins, assert_same, distance, lora_of, ragged

CASES = [(family, cut) for family in FAMILIES for cut in CUTS]


@pytest.fixture(scope="module", params=CASES, ids=[f"{family}-{a}-{c}" for family, (a, c) in CASES])
def twins(request: pytest.FixtureRequest, build: BuildTwins) -> Iterator[Twins]:
    twins = build(*request.param, ends_train_a=True)
    yield twins
    twins.close()


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_equal_the_uncut_models(twins: Twins, side: str, use_cache: bool) -> None:
    """Up to the rounding of attention with a mask (uncut, for the padding) and without (trunk: no padding, no mask).

    Only where the uncut model itself is further from 64 bits than the bound, that distance is the bound.
    """
    batch = ragged(side)
    split, whole = (model(**batch, use_cache=use_cache) for model in twins.both)
    exact = copy.deepcopy(twins.whole).double()
    real = batch["attention_mask"].bool()
    assert split.logits.shape == whole.logits.shape
    rows = zip(batch["input_ids"], real, strict=True)
    alone = torch.cat([exact(input_ids=ids_L[real_L][None]).logits[0] for ids_L, real_L in rows])
    bound = max(3e-6, distance(whole.logits[real], alone))
    assert distance(split.logits[real], whole.logits[real]) <= bound
    assert distance(split.loss, whole.loss) <= 1e-6


@torch.no_grad()
def test_logits_without_padding_equal_the_uncut_models_bit_for_bit(twins: Twins) -> None:
    split, whole = (model(**ragged("left", lengths=(30, 30, 30))) for model in twins.both)
    assert torch.equal(split.logits, whole.logits)
    assert torch.equal(split.loss, whole.loss)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "cut"), CASES)
@torch.no_grad()
def test_logits_of_a_freshly_initialized_model(
    family: str, cut: tuple[int, int], side: str, twins_of: BuildTwins
) -> None:
    batch = ragged(side)
    split, whole = (model(**batch) for model in twins_of(family, cut, vivid=False).both)
    real = batch["attention_mask"].bool()
    assert (split.logits - whole.logits)[real].abs().max() <= 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_every_adapter_gradient_equal_the_uncut_models(twins: Twins, side: str) -> None:
    twins.service._training.forget("a")
    losses = []
    for model in twins.both:
        model.zero_grad()
        loss = model(**ragged(side)).loss
        loss.backward()
        losses.append(loss.detach())
    expected = {name: parameter.grad for name, parameter in lora_of(twins.whole).items()}
    assert distance(*losses) <= 1e-5
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    assert_same(twins.split_gradients(), expected, 1e-5)
