"""Every family, every cut: the split model's logits, loss and adapter gradients are the uncut model's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import CUTS, FAMILIES, Twins, assert_same, distance, lora_of, ragged
from tests.pairwise import pairwise

SIDES = ("left", "right")
CASES = pairwise(complete=("family", "cut"), family=FAMILIES, cut=CUTS, side=SIDES, cached=(False, True))
"""Every family at every cut, on one side of padding, with a cache or without."""


@dataclass(frozen=True)
class Case:
    """Twins of one family and cut, and how their batches are padded."""

    twins: Twins
    side: str
    cached: bool


@pytest.fixture(scope="module", params=CASES, ids=[f"{family}-{a}-{c}" for family, (a, c), *_ in CASES])
def case(request: pytest.FixtureRequest, build: BuildTwins) -> Iterator[Case]:
    family, cut, side, cached = request.param
    twins = build(family, cut, ends_train_a=True)
    yield Case(twins, side, cached)
    twins.close()


@torch.no_grad()
def test_logits_equal_the_uncut_models(case: Case) -> None:
    """Up to the rounding of attention with a mask (uncut, for the padding) and without (trunk: no padding, no mask).

    Only where the uncut model itself is further from 64 bits than the bound, that distance is the bound.
    """
    twins, side, use_cache = case.twins, case.side, case.cached
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
def test_logits_without_padding_equal_the_uncut_models_bit_for_bit(case: Case) -> None:
    split, whole = (model(**ragged("left", lengths=(30, 30, 30))) for model in case.twins.both)
    assert torch.equal(split.logits, whole.logits)
    assert torch.equal(split.loss, whole.loss)


@pytest.mark.parametrize(
    ("family", "cut", "side"), pairwise(complete=("family", "cut"), family=FAMILIES, cut=CUTS, side=SIDES)
)
@torch.no_grad()
def test_logits_of_a_freshly_initialized_model(
    family: str, cut: tuple[int, int], side: str, twins_of: BuildTwins
) -> None:
    batch = ragged(side)
    split, whole = (model(**batch) for model in twins_of(family, cut, vivid=False).both)
    real = batch["attention_mask"].bool()
    assert (split.logits - whole.logits)[real].abs().max() <= 1e-6


def test_loss_and_every_adapter_gradient_equal_the_uncut_models(case: Case) -> None:
    twins, side = case.twins, case.side
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
