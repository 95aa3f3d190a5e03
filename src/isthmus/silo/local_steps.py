"""What a silo's own steps do beside the optimizer's: they go by gradients taken uphill, pulled back, or controlled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from isthmus.model.optim import build_optimizer
from isthmus.recipe import TrainSection
from isthmus.silo.control import Control
from isthmus.silo.remote import RemoteTrunk
from isthmus.silo.trainer import Step

Take = Callable[[torch.optim.Optimizer], Step]
"""Forward and backward on one batch, and a step of this optimizer."""


class Climb(torch.optim.Optimizer):
    """Its step goes uphill: by ρ along the gradient of all parameters together (SAM, Foret et al. 2021)."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], distance: float) -> None:
        super().__init__(parameters, {"distance": distance})
        self._left: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        """Where the parameters stood."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            moving = [one for one in group["params"] if one.grad is not None]
            length = float(torch.stack([one.grad.float().norm() for one in moving]).norm()) if moving else 0.0
            if not length:
                continue
            self._left += [(one, one.detach().clone()) for one in moving]
            for one in moving:
                one.add_(one.grad, alpha=group["distance"] / length)

    @torch.no_grad()
    def come_down(self) -> None:
        """Back to where the parameters stood, if they are uphill."""
        for parameter, place in self._left:
            parameter.copy_(place)
        self._left = []


class LocalSteps:
    """A silo's steps over these parameters of bottom and top, by uncut name."""

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], train: TrainSection, control: Control | None = None
    ) -> None:
        self._parameters, self._train, self._control = parameters, train, control
        self._start: dict[str, torch.Tensor] = {}
        self._climb: Climb | None = None

    def optimizer(self) -> torch.optim.Optimizer:
        """The recipe's, afresh, with gradients corrected before each of its steps."""
        optimizer = build_optimizer(self._parameters.values(), self._train)
        optimizer.register_step_pre_hook(self._correct)
        return optimizer

    def begin(self) -> None:
        """A round begins where the parameters are."""
        self._climb = None
        if self._train.proximal:
            self._start = {name: one.detach().clone() for name, one in self._parameters.items()}

    def take(self, take: Take, optimizer: torch.optim.Optimizer, trunk: RemoteTrunk) -> Step:
        """One step of this optimizer; with a sharpness by the gradient uphill, and its loss is that of before."""
        if not self._train.sharpness:
            return take(optimizer)
        self._climb = climb = Climb(self._parameters.values(), self._train.sharpness)
        try:
            with trunk.ascent_pass():
                first = take(climb)
            return replace(second := take(optimizer), loss=first.loss, seconds=first.seconds + second.seconds)
        finally:
            climb.come_down()

    @torch.no_grad()
    def _correct(self, *_: Any) -> None:
        """What is added to a step's gradients; before that the parameters come down from where these were taken."""
        if self._climb is not None:
            self._climb.come_down()
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if self._train.proximal:
                parameter.grad.add_(parameter - self._start[name], alpha=self._train.proximal)
            if self._control is not None:
                self._control.correct(name, parameter)
