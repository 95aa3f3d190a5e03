"""Ten optimizer steps on the split model equal ten steps on the uncut one."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from isthmus.silo.data import Batch
from isthmus.silo.trainer import train_step
from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import FAMILIES, assert_same, distance, lora_of, ragged

STEPS = 10


def batches() -> Iterable[Batch]:
    for step in range(STEPS):
        batch = ragged("left", seed=step, lengths=(6 + step, 25, 14))
        yield Batch(**batch, keep=batch["input_ids"].shape[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_adamw_steps(family: str, twins_of: BuildTwins) -> None:
    """From fresh adapters, with B alone training in bottom and top, as in a federation; losses too."""
    train = {"optimizer": "adamw", "learning_rate": 1e-3, "steps": STEPS}
    twins = twins_of(family, (1, 2), sections={"train": train}, moved=False)
    before = twins.split_adapter()
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
        for model in twins.both
    ]
    twins.remote.begin(1, ["a"])
    for number, batch in enumerate(batches(), 1):
        split, whole = (train_step(model, optimizer, batch) for model, optimizer in zip(twins.both, optimizers, strict=True))
        assert split.loss == pytest.approx(whole.loss, rel=1e-5)
        assert twins.remote.commit(1, number, split.weight) == 1
    after = twins.split_adapter()
    assert_same(after, {name: tensor.detach() for name, tensor in lora_of(twins.whole).items()}, 1e-5)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name, parameter in lora_of(twins.whole).items() if parameter.requires_grad}
