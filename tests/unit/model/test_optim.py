"""The recipe's optimizers: named, with its rate and momentum, and no decay."""

from __future__ import annotations

import pytest
import torch

from isthmus.model.optim import build_optimizer
from isthmus.recipe import TrainSection


def stepped(gradient: float, steps: int = 1, **train: object) -> float:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = build_optimizer([parameter], TrainSection.model_validate(train))
    for _ in range(steps):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
    return float(parameter.detach())


def test_sgd_goes_by_its_rate_and_keeps_its_momentum() -> None:
    assert stepped(2.0, optimizer="sgd", learning_rate=0.1) == pytest.approx(0.8)
    assert stepped(2.0, 2, optimizer="sgd", learning_rate=0.1, momentum=0.5) == pytest.approx(1 - 0.2 - 0.3)


def test_adamw_goes_by_signs_and_decays_nothing() -> None:
    assert stepped(5.0, optimizer="adamw", learning_rate=0.1) == pytest.approx(0.9, abs=1e-6)
    assert stepped(0.0, optimizer="adamw", learning_rate=0.1) == 1.0


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        build_optimizer([], TrainSection())
