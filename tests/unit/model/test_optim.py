"""The recipe's optimizers: named, with its rate, momentum and decay, and gradients of at most its norm."""

from __future__ import annotations

import pytest
import torch

from isthmus.errors import MismatchError
from isthmus.model.optim import build_optimizer, restore_optimizer, set_rate
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


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_matrices_decay_and_vectors_do_not(optimizer: str) -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(1, 1)), torch.nn.Parameter(torch.ones(1))
    train = TrainSection.model_validate({"optimizer": optimizer, "learning_rate": 0.1, "weight_decay": 0.5})
    built = build_optimizer([matrix, vector], train)
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    assert (float(matrix.detach()), float(vector.detach())) == (pytest.approx(0.95), 1.0)


def test_gradients_are_clipped_together_after_they_are_corrected() -> None:
    pair = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]

    def correct() -> None:
        assert pair[1].grad is not None
        pair[1].grad.mul_(2.0)

    train = TrainSection(optimizer="sgd", learning_rate=1.0, max_grad_norm=1.0)
    optimizer = build_optimizer(pair, train, correct)
    for parameter, gradient in zip(pair, (3.0, 2.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    optimizer.step()
    assert [float(one.detach()) for one in pair] == pytest.approx([-0.6, -0.8], rel=1e-5)


def test_a_rate_is_that_of_the_next_step() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer([parameter], TrainSection(optimizer="sgd", learning_rate=1.0))
    set_rate(optimizer, 0.25)
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert float(parameter.detach()) == -0.25


@pytest.mark.parametrize("saved", ["sgd", "adamw"])
@pytest.mark.parametrize("here", ["sgd", "adamw"])
def test_a_state_is_of_the_same_optimizer_or_refused(saved: str, here: str) -> None:
    def built(kind: str) -> torch.optim.Optimizer:
        parameter = torch.nn.Parameter(torch.ones(1))
        parameter.grad = torch.ones(1)
        return build_optimizer([parameter], TrainSection.model_validate({"optimizer": kind}))

    before, after = built(saved), built(here)
    before.step()
    if saved != here:
        with pytest.raises(MismatchError, match="another optimizer"):
            restore_optimizer(after, before.state_dict())
        return
    restore_optimizer(after, before.state_dict())
    after.step()
    assert str(after.state_dict()["state"].keys()) == str(before.state_dict()["state"].keys())
