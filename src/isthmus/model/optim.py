"""The optimizers that a recipe can name, the same for every part."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from isthmus.recipe import TrainSection


def build_optimizer(parameters: Iterable[torch.nn.Parameter], train: TrainSection) -> torch.optim.Optimizer:
    """The recipe's optimizer for these parameters."""
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=train.learning_rate, momentum=train.momentum)
    return torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=0.0)
