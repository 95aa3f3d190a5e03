"""Releasing each example once trains as ever: epochs on kept states equal epochs on the uncut model, bottom frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.data.tokens import Batch
from isthmus.privacy.events import Release
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import train_step
from tests.oracle.conftest import BuildTwins
from tests.oracle.test_hf_trainer import rows, trainer_of
from tests.oracle.twins import FAMILIES, Twins, assert_same, batch_of, distance, lora_of, ragged

EPOCHS, RATE = 3, 1e-3
RAGGED, EVEN = ((6, 25, 14), (9, 3, 40)), ((20,) * 3, (26,) * 3)
ONCE: dict[str, Any] = {"lora": {"freeze_bottom": True}, "boundary": {"release_once": True}}
NOISY: dict[str, Any] = {**ONCE, "boundary": {"release_once": True, "forward": {"noise": 0.05}}}
Build = Callable[..., Twins]


@pytest.fixture
def build_once(twins_of: BuildTwins) -> Build:
    def build(family: str, sections: dict[str, Any] = ONCE, *, optimizer: str = "sgd", steps: int = 0) -> Twins:
        steps = steps or EPOCHS * len(RAGGED)
        train = {"optimizer": optimizer, "learning_rate": RATE, "steps": steps}
        return twins_of(family, (2, 1), sections={"train": train, **sections}, moved=False)

    return build


def epochs(lengths: tuple[tuple[int, ...], ...]) -> Iterator[Batch]:
    """The same rows in every epoch, the batches' order turned around every time."""
    batches = [batch_of(ragged("left", seed=seed, lengths=of_batch)) for seed, of_batch in enumerate(lengths)]
    for epoch in range(EPOCHS):
        yield from batches[:: -1 if epoch % 2 else 1]


def count_bottom(twins: Twins) -> list[int]:
    """Rows of each time that bottom runs, from now on."""
    found: list[int] = []
    backbone = twins.split.bottom.family.backbone_of(twins.split.bottom.model)
    backbone.register_forward_hook(lambda *call: found.append(len(call[-1].last_hidden_state)))
    return found


def released(twins: Twins) -> list[int]:
    """Tokens of each hidden state that left."""
    releases: list[Release] = twins.boundary.ledger.releases
    return [release.rows for release in releases if release.path == "forward"]


def train(twins: Twins, lengths: tuple[tuple[int, ...], ...], optimizer: str, micro_batches: int) -> None:
    """All epochs on both models; losses are compared on the way."""
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    own, other = (
        kind([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0) for model in twins.both
    )
    exact = lengths == EVEN and micro_batches == 1
    twins.rounds.begin(1, ["a"])
    for number, batch in enumerate(epochs(lengths), 1):
        if micro_batches == 1:
            split = train_step(twins.split, own, batch)
        else:
            split = pipelined_step(twins.split, own, batch, micro_batches)
        whole = train_step(twins.whole, other, batch)
        assert split.loss == pytest.approx(whole.loss, rel=0 if exact else 1e-5)
        twins.rounds.commit(1, number, split.weight)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("lengths", "micro_batches", "tolerance"),
    [
        pytest.param(EVEN, 1, 0.0, id="bit-for-bit"),
        pytest.param(RAGGED, 1, 1e-3, id="ragged"),
        pytest.param(RAGGED, 2, 1e-3, id="micro-batches"),
    ],
)
def test_epochs(
    family: str,
    optimizer: str,
    lengths: tuple[tuple[int, ...], ...],
    micro_batches: int,
    tolerance: float,
    build_once: Build,
) -> None:
    twins = build_once(family, optimizer=optimizer)
    before, ran = twins.split_adapter(), count_bottom(twins)
    train(twins, lengths, optimizer, micro_batches)
    after = twins.split_adapter()
    assert_same(after, {name: tensor.detach() for name, tensor in lora_of(twins.whole).items()}, tolerance)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name, parameter in lora_of(twins.whole).items() if parameter.requires_grad}
    assert sum(ran) == 6
    assert sorted(released(twins)) == sorted(length for of_batch in lengths for length in of_batch)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_the_uncut_model(family: str, build_once: Build) -> None:
    """The first time and from what is kept, padded on either side; up to the rounding of attention with a mask."""
    twins = build_once(family)
    for side in ("left", "right", "left"):
        batch = ragged(side)
        split, whole = (model(**batch, use_cache=False) for model in twins.both)
        real = batch["attention_mask"].bool()
        assert distance(split.logits[real], whole.logits[real]) <= 5e-6
        assert distance(split.loss, whole.loss) <= 1e-6
    assert len(released(twins)) == 3


@torch.no_grad()
def test_later_epochs_see_the_same_noise(build_once: Build) -> None:
    twins, batch = build_once("llama", NOISY), ragged("left")
    first, second = (twins.split(**batch, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)
    assert distance(first, twins.whole(**batch).logits) > 1e-3


def test_trainer_of_transformers_releases_once_too(build_once: Build, tmp_path: Path) -> None:
    twins = build_once("llama", {**ONCE, "train": {"optimizer": "sgd", "learning_rate": 0.05, "steps": 3}})
    split = trainer_of(twins.split, tmp_path)
    whole = trainer_of(twins.whole, tmp_path)
    for trainer in (split, whole):
        trainer.train()
    expected = {name: tensor.detach() for name, tensor in lora_of(twins.whole).items()}
    assert_same(twins.split_adapter(), expected, 1e-5)
    assert len(released(twins)) == len(rows())
    for _ in range(2):
        losses = [torch.tensor(trainer.evaluate()["eval_loss"]) for trainer in (split, whole)]
        assert distance(*losses) <= 1e-5
        assert len(released(twins)) == len(rows()) + len(split.eval_dataset)
    split.evaluate(eval_dataset=rows())
    assert len(released(twins)) == len(rows()) + len(split.eval_dataset)
