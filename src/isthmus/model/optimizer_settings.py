"""What an optimizer does to a parameter, as numbers that cross: the trunk steps its adapter as the silo steps its own.

The names are torch's. Implementation choices without an effect on the result (``foreach``, ``fused``) are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from isthmus.errors import NotSupportedError
from isthmus.wire import isthmus_pb2 as pb

_KINDS: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adamw",
}
_OF_KIND = {kind: optimizer for optimizer, kind in _KINDS.items()}
_REMEDY = 'train with torch.optim.AdamW, Adam or SGD (in TrainingArguments optim="adamw_torch")'


@dataclass(frozen=True)
class OptimizerSettings:
    """Kind and settings of an optimizer for one group of parameters."""

    kind: str
    """``sgd``, ``adam`` or ``adamw``."""
    learning_rate: float
    weight_decay: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    epsilon: float = 0.0
    amsgrad: bool = False
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    fresh: bool = False
    """Whether it has no state yet."""

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.nn.Parameter
    ) -> OptimizerSettings:
        """The settings of a parameter in one of the optimizer's groups.

        Raises:
            NotSupportedError: the optimizer is of another class, or maximizes.
        """
        kind = _KINDS.get(type(optimizer))
        if kind is None:
            raise NotSupportedError(f"the trunk cannot follow the optimizer {type(optimizer).__name__}", remedy=_REMEDY)
        if group.get("maximize"):
            raise NotSupportedError("the trunk cannot follow an optimizer with maximize=True", remedy=_REMEDY)
        shared: dict[str, Any] = {
            "kind": kind,
            "learning_rate": float(group["lr"]),
            "weight_decay": float(group["weight_decay"]),
            "fresh": not optimizer.state.get(parameter),
        }
        if kind == "sgd":
            names = ("momentum", "dampening", "nesterov")
            return cls(**shared, **{name: group[name] for name in names})
        beta1, beta2 = map(float, group["betas"])
        return cls(**shared, beta1=beta1, beta2=beta2, epsilon=float(group["eps"]), amsgrad=group["amsgrad"])

    @classmethod
    def received(cls, message: pb.Optimizer) -> OptimizerSettings:
        """The settings in a checked message."""
        return cls(**{field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields})

    def message(self) -> pb.Optimizer:
        """The settings as they cross."""
        return pb.Optimizer(**asdict(self))

    def optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """A new optimizer with these settings."""
        return _OF_KIND[self.kind](parameters, **self._arguments())

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Give an optimizer of the same kind these settings; its state stays."""
        for group in optimizer.param_groups:
            group.update(self._arguments())

    def fits(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer can go on with these settings: it is of their kind, and so is its state."""
        amsgrad = optimizer.param_groups[0].get("amsgrad", False)
        return not self.fresh and _KINDS.get(type(optimizer)) == self.kind and amsgrad == self.amsgrad

    def _arguments(self) -> dict[str, Any]:
        shared = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if self.kind == "sgd":
            return {**shared, "momentum": self.momentum, "dampening": self.dampening, "nesterov": self.nesterov}
        return {**shared, "betas": (self.beta1, self.beta2), "eps": self.epsilon, "amsgrad": self.amsgrad}
