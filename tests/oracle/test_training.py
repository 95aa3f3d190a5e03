"""Ten optimizer steps on the split model equal ten steps on the uncut one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from isthmus.data.tokens import Batch
from isthmus.model import loss
from isthmus.silo.trainer import train_step
from tests.conftest import VOCABULARY
from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import FAMILIES, Twins, assert_same, batch_of, lora_of, ragged

STEPS = 10
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def batches(*, padding: bool) -> Iterator[Batch]:
    for step in range(STEPS):
        yield batch_of(ragged("left", seed=step, lengths=(6 + step, 25, 14) if padding else (20 + step,) * 3))


def train(twins: Twins, optimizer: str, *, padding: bool) -> None:
    """Ten steps of both; losses are compared on the way."""
    optimizers = [
        OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
        for model in twins.both
    ]
    twins.rounds.begin(1, ["a"])
    for number, batch in enumerate(batches(padding=padding), 1):
        split, whole = (train_step(model, own, batch) for model, own in zip(twins.both, optimizers, strict=True))
        assert split.loss == pytest.approx(whole.loss, rel=1e-5 if padding else 0)
        assert twins.rounds.commit(1, number, split.weight) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("padding", "tolerance"), [(False, 0.0), (True, 2e-4)], ids=["bit-for-bit", "ragged"])
def test_ten_steps(family: str, optimizer: str, padding: bool, tolerance: float, twins_of: BuildTwins) -> None:
    """From fresh adapters, with B alone training in bottom and top, as in a federation.

    Ragged batches differ by the rounding of masked attention, which Adam's division by tiny gradients enlarges.
    """
    sections = {"train": {"optimizer": optimizer, "learning_rate": 1e-3, "steps": STEPS}}
    twins = twins_of(family, (1, 2), sections=sections, moved=False)
    before = twins.split_adapter()
    train(twins, optimizer, padding=padding)
    after = twins.split_adapter()
    assert_same(after, {name: tensor.detach() for name, tensor in lora_of(twins.whole).items()}, tolerance)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name, parameter in lora_of(twins.whole).items() if parameter.requires_grad}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_with_the_loss_in_pieces(
    family: str, recompute: bool, twins_of: BuildTwins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a large vocabulary has it, seven positions at a time: equal within rounding. So are steps whose ends compute
    their activations again."""
    monkeypatch.setattr(loss, "FEW", 0)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    sections = {"train": {"optimizer": "sgd", "learning_rate": 1e-3, "steps": STEPS}}
    twins = twins_of(family, (1, 2), sections=sections, moved=False)
    twins.split.recompute = recompute
    train(twins, "sgd", padding=True)
    assert_same(twins.split_adapter(), {name: one.detach() for name, one in lora_of(twins.whole).items()}, 2e-4)
