"""The adversary's whole model computes what the uncut one does, with the loss on the answer alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import TokenRow, outsider_view
from isthmus.attacks.whole_model import WholeModel, frozen, losses
from tests.conftest import make_recipe, uncut

ROW = TokenRow((5, 60, 17), (33, 8))


def whole(folder: Path, *, noisy: bool = False, **boundary: Any) -> WholeModel:
    recipe = make_recipe(folder, boundary=boundary)
    return WholeModel(Knowledge(outsider_view(recipe, folder, {}, {})), noisy=noisy)


def test_its_loss_is_the_uncut_models(attacked_model: Path) -> None:
    ids = torch.tensor([[*ROW.prompt, *ROW.answer]])
    labels = ids.clone()
    labels[:, : len(ROW.prompt)] = -100
    expected = uncut(attacked_model)(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(whole(attacked_model).loss(ROW), expected, rtol=1e-4, atol=1e-5)


def test_all_parts_train_unless_frozen(attacked_model: Path) -> None:
    model = whole(attacked_model)
    model.loss(ROW).backward()
    assert all(one.grad is not None for one in model.adapter().values())
    assert not any(one.requires_grad for one in frozen(model).parameters())
    assert next(losses(frozen(model), (ROW, ROW))) == pytest.approx(float(model.loss(ROW)))


def test_noise_is_added_if_asked(attacked_model: Path) -> None:
    noise = {"forward": {"noise": 1.0}}
    quiet, noisy = whole(attacked_model, **noise), whole(attacked_model, noisy=True, **noise)
    assert torch.equal(quiet.loss(ROW), quiet.loss(ROW))
    assert not torch.equal(noisy.loss(ROW), noisy.loss(ROW))


def test_a_row_without_an_answer_has_no_loss(attacked_model: Path) -> None:
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        whole(attacked_model).loss(TokenRow((5,), ()))
