"""The optimizers that a recipe can name, the same for every part, and the learning rate of their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from isthmus.errors import MismatchError
from isthmus.recipe import TrainSection


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], train: TrainSection, correct: Callable[[], None] | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimizer for the parameters of one party.

    Weight decay is of matrices alone. Before each step the gradients of all parameters together are scaled down to
    ``train.max_grad_norm``, if the recipe has one.

    Args:
        correct: called before that, to change the gradients.
    """
    parameters = list(parameters)
    groups: Any = parameters
    if train.weight_decay and any(parameter.ndim == 1 for parameter in parameters):
        vectors = [parameter for parameter in parameters if parameter.ndim == 1]
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = _optimizer(groups, train)

    def prepare(*_: Any) -> None:
        if correct is not None:
            correct()
        if train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)

    if correct is not None or train.max_grad_norm is not None:
        optimizer.register_step_pre_hook(prepare)
    return optimizer


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Replace an optimizer's state by one that its ``state_dict`` returned.

    Raises:
        MismatchError: it is of an optimizer without settings that this one needs; torch would take it, and fail at the
            next step.
    """
    needed = optimizer.defaults.keys()
    if missing := sorted({key for group in state["param_groups"] for key in needed - group.keys()}):
        raise MismatchError(
            f"the saved state is of another optimizer than {type(optimizer).__name__}: it has no {', '.join(missing)}",
            remedy="go on with the train.optimizer, train.steps and federation.updates that the run began with, "
            "or begin a new run",
        )
    optimizer.load_state_dict(dict(state))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the optimizer's next steps."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _optimizer(groups: Any, train: TrainSection) -> torch.optim.Optimizer:
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.learning_rate, momentum=train.momentum, weight_decay=train.weight_decay)
    return torch.optim.AdamW(groups, lr=train.learning_rate, weight_decay=train.weight_decay)
