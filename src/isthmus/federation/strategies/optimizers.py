"""Server optimizers: the round's change as a step.

Shapes: P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from isthmus.model.optim import build_optimizer, restore_optimizer, set_rate
from isthmus.recipe import OptimizerSection, TrainSection


class ServerOptimizer(Protocol):
    """Takes each round's change for a gradient, with the sign reversed."""

    def step(self, change_P: torch.Tensor) -> torch.Tensor:
        """The step that is added to the shared parameters, fp64, P.

        Args:
            change_P: the round's combined change, fp64.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state after earlier rounds."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class MomentumOptimizer:
    """Earlier rounds' changes go on in later steps (FedAvgM, Hsu et al. 2019)."""

    def __init__(self, section: OptimizerSection) -> None:
        self._rate, self._beta = section.rate, section.momentum
        self._velocity_P: torch.Tensor | None = None

    def step(self, change_P: torch.Tensor) -> torch.Tensor:
        earlier_P = torch.zeros_like(change_P) if self._velocity_P is None else self._velocity_P
        self._velocity_P = self._beta * earlier_P + change_P
        return self._rate * self._velocity_P

    def state_dict(self) -> dict[str, Any]:
        return {"velocity": self._velocity_P}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._velocity_P = state.get("velocity")


class Adaptive:
    """Each parameter's step is scaled by the size of its earlier changes (Reddi et al. 2021, algorithm 2).

    As in the paper no bias is corrected and v begins at τ². ``torch.optim.Adam`` does otherwise, and there is no Yogi.
    """

    def __init__(self, section: OptimizerSection) -> None:
        self._kind, self._rate, self._tau = section.kind, section.rate, section.adaptivity
        self._beta1 = 0.0 if section.kind == "adagrad" else section.momentum
        self._beta2 = section.second_momentum
        self._first_P: torch.Tensor | None = None
        """m: the mean of the changes so far."""
        self._second_P: torch.Tensor | None = None
        """v: of their squares."""

    def step(self, change_P: torch.Tensor) -> torch.Tensor:
        if self._first_P is None or self._second_P is None:
            self._first_P, self._second_P = torch.zeros_like(change_P), torch.full_like(change_P, self._tau**2)
        self._first_P = self._beta1 * self._first_P + (1 - self._beta1) * change_P
        self._second_P = self._squares(self._second_P, change_P.square())
        return self._rate * self._first_P / (self._second_P.sqrt() + self._tau)

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first_P, "second": self._second_P}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first_P, self._second_P = state.get("first"), state.get("second")

    def _squares(self, before_P: torch.Tensor, square_P: torch.Tensor) -> torch.Tensor:
        if self._kind == "adagrad":
            return before_P + square_P
        if self._kind == "adam":
            return self._beta2 * before_P + (1 - self._beta2) * square_P
        return before_P - (1 - self._beta2) * square_P * torch.sign(before_P - square_P)


class GradientOptimizer:
    """The recipe's own optimizer, where updates are gradients: one step with their mean is the step that one model
    takes on the rows of all silos (FedSGD, McMahan et al. 2017).

    Args:
        train: its settings. The norm that ``max_grad_norm`` bounds is that of the mean.
    """

    def __init__(self, train: TrainSection) -> None:
        self._train = train
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._loaded: dict[str, Any] = {}

    def step(
        self, base: Mapping[str, torch.Tensor], descent: Mapping[str, torch.Tensor], round: int
    ) -> dict[str, torch.Tensor]:
        """The tensors after one step.

        Args:
            base: before it; the same names and shapes in every call.
            descent: the mean of the gradients, with the sign reversed.
            round: the round's number, by which the learning rate follows its schedule.
        """
        optimizer = self._optimizer or self._begun(base)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(base[name])
                parameter.grad = -descent[name].to(parameter.dtype)
        set_rate(optimizer, self._train.rate(round, self._train.rounds))
        optimizer.step()
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def state_dict(self) -> dict[str, Any]:
        return self._loaded if self._optimizer is None else self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded, self._optimizer = state, None

    def _begun(self, base: Mapping[str, torch.Tensor]) -> torch.optim.Optimizer:
        self._parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in base.items()}
        self._optimizer = build_optimizer(self._parameters.values(), self._train)
        if self._loaded:
            restore_optimizer(self._optimizer, self._loaded)
        return self._optimizer


def optimizer_of(section: OptimizerSection) -> ServerOptimizer | None:
    """The optimizer that a recipe's section asks for; None: the change is the step (FedAvg)."""
    if section.kind == "none":
        return None
    return MomentumOptimizer(section) if section.kind == "momentum" else Adaptive(section)
