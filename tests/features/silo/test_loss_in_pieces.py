"""A silo whose logits are many computes its loss in pieces, and trains to the same adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isthmus.data.tokens import Tokens, collate
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.head_loss import HeadLoss
from isthmus.silo.join import Silo, greeting, join
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.trainer import loss_of, train_step
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import VOCABULARY, make_recipe, save_tiny_model

STEPS = 3
ROWS = [Tokens(list(range(4, 4 + n)), [50 + n, 60 + n, 70 + n]) for n in (3, 9, 5, 7)]
FEW = 5 * VOCABULARY
"""Logits of five positions: fewer than a batch has."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


@pytest.fixture
def silo(model: Path, tmp_path: Path) -> Callable[[int | None], Silo]:
    def joined(piece: int | None) -> Silo:
        recipe = make_recipe(model, train={"steps": 99})
        service = TrunkService(recipe, RoleDirectory(tmp_path / str(piece)))
        hello = greeting(Checkpoint(recipe.model.path), recipe)
        made = join(recipe, "a", channel=LoopbackChannel(service, "a", greeting=hello))
        made.rounds.by_hand = True
        if piece is not None:
            made.model._head_loss = HeadLoss(made.model.top, piece)
        return made

    return joined


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_training_in_pieces_is_training(silo: Callable[[int | None], Silo], micro_batches: int) -> None:
    batch, trained = collate(ROWS, 0), []
    for piece in (None, FEW):
        own = silo(piece)
        own.rounds.begin(1, ["a"])
        optimizer = torch.optim.SGD([one for one in own.model.parameters() if one.requires_grad], lr=0.1)
        losses = [
            train_step(own.model, optimizer, batch).loss
            if micro_batches == 1
            else pipelined_step(own.model, optimizer, batch, micro_batches).loss
            for _ in range(STEPS)
        ]
        trained.append((losses, [one.detach().clone() for one in own.model.parameters() if one.requires_grad]))
        assert own.model._head_loss.is_small(batch.targets) == (piece is None)
    (plain, expected), (pieces, found) = trained
    assert pieces == pytest.approx(plain, rel=1e-6)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_measuring_in_pieces_is_measuring(silo: Callable[[int | None], Silo]) -> None:
    batch = collate(ROWS, 0)
    plain, pieces = (float(loss_of(silo(piece).model, batch)) for piece in (None, FEW))
    assert pieces == pytest.approx(plain, rel=1e-6)
