"""A silo's steps: pulled back to where the round began, taken uphill, and never left standing there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from isthmus.recipe import TrainSection
from isthmus.silo.local_steps import Ascent, LocalSteps
from isthmus.silo.trainer import Step

RATE = 0.1


class Trunk:
    """Notes the passes that only climb."""

    ascents = 0

    @contextmanager
    def ascent_pass(self) -> Iterator[None]:
        self.ascents += 1
        yield


def parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values))


def steps_of(one: torch.nn.Parameter, **train: Any) -> tuple[LocalSteps, torch.optim.Optimizer]:
    local = LocalSteps({"x": one}, TrainSection(optimizer="sgd", learning_rate=RATE, **train))
    return local, local.optimizer()


def by(one: torch.nn.Parameter, gradient: Any) -> Any:
    """Steps along this gradient, which may depend on where the parameter is."""

    def take(optimizer: torch.optim.Optimizer) -> Step:
        loss = float(one.detach().sum())
        one.grad = gradient(one.detach()).clone()
        optimizer.step()
        return Step(loss, 1, 1, 0.5)

    return take


def test_a_plain_step_is_the_optimizers() -> None:
    one = parameter(1.0, 2.0)
    local, optimizer = steps_of(one)
    local.begin()
    local.take(by(one, lambda at: torch.ones_like(at)), optimizer, Trunk())  # type: ignore[arg-type]
    assert one.tolist() == pytest.approx([0.9, 1.9])


def test_a_proximal_pull_is_to_where_the_round_began() -> None:
    one = parameter(1.0)
    local, optimizer = steps_of(one, proximal=0.5)
    local.begin()
    for _ in range(2):
        local.take(by(one, lambda at: torch.ones_like(at)), optimizer, Trunk())  # type: ignore[arg-type]
    assert one.item() == pytest.approx(0.9 - RATE * (1 + 0.5 * (0.9 - 1.0)))
    local.begin()
    local.take(by(one, lambda at: torch.zeros_like(at)), optimizer, Trunk())  # type: ignore[arg-type]
    assert one.item() == pytest.approx(0.9 - RATE * (1 + 0.5 * (0.9 - 1.0)))


def test_a_sharp_step_takes_the_gradient_uphill_from_where_it_stood() -> None:
    one, trunk = parameter(3.0, 4.0), Trunk()
    local, optimizer = steps_of(one, sharpness=0.5)
    local.begin()
    step = local.take(by(one, lambda at: at), optimizer, trunk)  # type: ignore[arg-type]
    uphill = torch.tensor([3.0, 4.0]) * (1 + 0.5 / 5.0)
    torch.testing.assert_close(one.detach(), torch.tensor([3.0, 4.0]) - RATE * uphill)
    assert (step.loss, step.seconds, trunk.ascents) == (7.0, 1.0, 1)


def test_a_step_that_fails_uphill_leaves_the_parameters_where_they_stood() -> None:
    one = parameter(3.0, 4.0)
    local, optimizer = steps_of(one, sharpness=0.5)
    first = by(one, lambda at: at)

    def failing(given: torch.optim.Optimizer) -> Step:
        if isinstance(given, Ascent):
            return first(given)  # type: ignore[no-any-return]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        local.take(failing, optimizer, Trunk())  # type: ignore[arg-type]
    assert one.tolist() == [3.0, 4.0]


def test_without_a_gradient_there_is_no_uphill() -> None:
    one = parameter(3.0)
    climb = Ascent([one], 0.5)
    climb.step()
    one.grad = torch.zeros(1)
    climb.step()
    assert one.item() == 3.0


@pytest.mark.parametrize("sharpness", [0.0, 0.5])
def test_where_the_root_steps_the_gradient_stays_and_nothing_moves(sharpness: float) -> None:
    one = parameter(3.0, 4.0)
    local = LocalSteps(
        {"x": one}, TrainSection(optimizer="adamw", sharpness=sharpness, max_grad_norm=0.01), gradients=True
    )
    local.begin()
    local.take(by(one, lambda at: at), local.optimizer(), Trunk())  # type: ignore[arg-type]
    assert one.tolist() == [3.0, 4.0]
    assert one.grad is not None
    assert one.grad.tolist() == pytest.approx([3.0 + 0.6 * sharpness, 4.0 + 0.8 * sharpness])
