"""SCAFFOLD's control variates in a silo (Karimireddy et al. 2020, option II): they correct its gradients' drift.

Letters: c the mean of all silos' controls, cᵢ this silo's, x what a round begins with, yᵢ what the silo makes of it in
K steps of the rate η. Each step goes by g - cᵢ + c, and the round changes cᵢ by (x - yᵢ) / Kη - c: by nothing but the
update and the plan. So the root computes the change of c from the mean of the updates, and no silo sends
more than its update. This silo computes its own from the update as it crossed, clipped, noised and rounded: then c
stays the mean of the cᵢ, and no noise adds up over the rounds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from isthmus.recipe import Recipe
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb

Tensors = Mapping[str, torch.Tensor]
log = logging.getLogger(__name__)


class SiloControl:
    """The control variates c and cᵢ of one silo, by the tensors' uncut names.

    A round's change of cᵢ is pending until a plan says that the root counted it: an update that was lost on its way
    must not be in cᵢ either.
    """

    def __init__(self, recipe: Recipe, name: str) -> None:
        self._name = name
        self._reach = recipe.train.learning_rate * recipe.mean_reach(1)
        """Kη."""
        self._mean: dict[str, torch.Tensor] = {}
        self._own: dict[str, torch.Tensor] = {}
        self._pending: dict[str, torch.Tensor] = {}
        """The last round's change of cᵢ, until the root has counted it, fp64."""
        self._round = 0
        """The number of that round."""

    def begin(self, plan: pb.Plan, trained: Tensors) -> None:
        """A round of these tensors begins.

        Raises:
            FrameError: the plan's control is not of just these.
        """
        counted = plan.counted.get(self._name, 0)
        if self._pending and counted == self._round:
            for name, change in self._pending.items():
                own = self._own.get(name, torch.zeros_like(change))
                self._own[name] = (own.double() + change).float()
        elif counted > self._round:
            log.warning("the root knows this silo's control of round %d, the silo does not: it starts afresh", counted)
        self._pending = {}
        shapes = {name: tuple(tensor.shape) for name, tensor in trained.items()}
        self._mean = codec.decode_named(plan.control, shapes)

    def correct(self, name: str, parameter: torch.Tensor) -> None:
        """Add c - cᵢ to this parameter's gradient."""
        assert parameter.grad is not None
        mean, own = self._mean[name], self._own.get(name)
        parameter.grad.add_((mean if own is None else mean - own).to(parameter.grad))

    def end(self, round: int, received: Tensors | None) -> None:
        """The round is over.

        Args:
            received: the change as the root receives it; None: it receives none.
        """
        self._round = round
        self._pending = {
            name: -self._mean[name].double() - change.double().cpu() / self._reach
            for name, change in (received or {}).items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {"own": dict(self._own), "due": dict(self._pending), "round": self._round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave; an empty state is that of a silo without earlier rounds."""
        self._own, self._pending = dict(state.get("own", {})), dict(state.get("due", {}))
        self._round = state.get("round", 0)


def silo_control(recipe: Recipe, name: str) -> SiloControl | None:
    """The control variates of a recipe with SCAFFOLD; None: the recipe has none."""
    return SiloControl(recipe, name) if recipe.federation.control == "scaffold" else None
