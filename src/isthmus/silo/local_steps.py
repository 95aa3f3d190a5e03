"""A silo's local optimizer steps: sharpness-aware (SAM), proximal (FedProx), or corrected by SCAFFOLD's controls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch

from isthmus.model.optim import build_optimizer
from isthmus.recipe import TrainSection
from isthmus.silo.control import SiloControl
from isthmus.silo.remote import RemoteTrunk
from isthmus.silo.trainer import Step

Take = Callable[[torch.optim.Optimizer], Step]
"""Forward and backward on one batch, and a step of this optimizer."""


class Ascent(torch.optim.Optimizer):
    """The ascent step of SAM (Foret et al. 2021): by ρ along the gradient of all parameters together."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], distance: float) -> None:
        super().__init__(parameters, {"distance": distance})
        self._moved: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        """Parameters that are moved, and their values before that."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            moving = [one for one in group["params"] if one.grad is not None]
            length = float(torch.stack([one.grad.float().norm() for one in moving]).norm()) if moving else 0.0
            if not length:
                continue
            self._moved += [(one, one.detach().clone()) for one in moving]
            for one in moving:
                one.add_(one.grad, alpha=group["distance"] / length)

    @torch.no_grad()
    def undo(self) -> None:
        """Set the moved parameters back to their values before the step."""
        for parameter, value in self._moved:
            parameter.copy_(value)
        self._moved = []


class Resting(torch.optim.Optimizer):
    """An optimizer whose steps leave the parameters as they are: their gradients are what a step is for."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Nothing moves; hooks that change the gradients before a step are called."""


class LocalSteps:
    """A silo's steps. The gradients of bottom and top are clipped together to ``train.max_grad_norm``.

    Args:
        parameters: of bottom and top, by uncut name.
        control: SCAFFOLD's control variates; None: gradients are not corrected.
        gradients: whether the root takes the steps, with the mean of what is in the parameters' ``grad`` after
            ``take``; it clips that mean, the silo nothing.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        train: TrainSection,
        control: SiloControl | None = None,
        *,
        gradients: bool = False,
    ) -> None:
        self._parameters, self._train, self._control = parameters, train, control
        self._gradients = gradients
        self._start: dict[str, torch.Tensor] = {}
        self._ascent: Ascent | None = None

    def optimizer(self) -> torch.optim.Optimizer:
        """A new optimizer, as the recipe says, that corrects the gradients before each of its steps."""
        corrects = self._train.proximal or self._train.sharpness or self._control is not None
        correct = self._correct if corrects else None
        if not self._gradients:
            return build_optimizer(self._parameters.values(), self._train, correct)
        resting = Resting(self._parameters.values())
        if correct is not None:
            resting.register_step_pre_hook(lambda *_: correct())
        return resting

    def begin(self) -> None:
        """A round begins from the present values of the parameters."""
        self._ascent = None
        if self._train.proximal:
            self._start = {name: one.detach().clone() for name, one in self._parameters.items()}

    def take(self, take: Take, optimizer: torch.optim.Optimizer, trunk: RemoteTrunk) -> Step:
        """One step of this optimizer; with a sharpness by the gradient after the ascent, with the loss before it."""
        if not self._train.sharpness:
            return take(optimizer)
        self._ascent = ascent = Ascent(self._parameters.values(), self._train.sharpness)
        try:
            with trunk.ascent_pass():
                first = take(ascent)
            return replace(second := take(optimizer), loss=first.loss, seconds=first.seconds + second.seconds)
        finally:
            ascent.undo()

    @torch.no_grad()
    def _correct(self) -> None:
        """Undo the ascent, then add the proximal and control terms to the gradients."""
        if self._ascent is not None:
            self._ascent.undo()
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if self._train.proximal:
                parameter.grad.add_(parameter - self._start[name], alpha=self._train.proximal)
            if self._control is not None:
                self._control.correct(name, parameter)
