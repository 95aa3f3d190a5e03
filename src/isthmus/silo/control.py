"""SCAFFOLD's controls in a silo (Karimireddy et al. 2020, option II): what sets its gradients apart is taken out.

Letters: c the mean of all silos' controls, cᵢ this silo's, x what a round begins with, yᵢ what the silo makes of it in
K steps of the rate η. Each step goes by g - cᵢ + c, and the round changes cᵢ by (x - yᵢ) / Kη - c: by nothing but the
update and what the plan told. So the root computes the change of c from the mean of the updates, and no silo sends
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


class Control:
    """One silo's c and cᵢ, by the tensors' uncut names.

    What a round changes waits until a plan says that the root counted it: an update may be lost on its way, and then
    it must not be in cᵢ either.
    """

    def __init__(self, recipe: Recipe, name: str) -> None:
        self._name = name
        self._way = recipe.train.learning_rate * recipe.mean_reach
        """Kη."""
        self._mean: dict[str, torch.Tensor] = {}
        self._own: dict[str, torch.Tensor] = {}
        self._due: dict[str, torch.Tensor] = {}
        """What the last round changes, fp64."""
        self._round = 0
        """Which round that was."""

    def begin(self, plan: pb.Plan, trained: Tensors) -> None:
        """A round of these tensors begins.

        Raises:
            FrameError: the plan's control is not of just these.
        """
        counted = plan.counted.get(self._name, 0)
        if self._due and counted == self._round:
            for name, change in self._due.items():
                own = self._own.get(name, torch.zeros_like(change))
                self._own[name] = (own.double() + change).float()
        elif counted > self._round:
            log.warning("the root knows this silo's control of round %d, the silo does not: it starts afresh", counted)
        self._due = {}
        shapes = {name: tuple(tensor.shape) for name, tensor in trained.items()}
        self._mean = codec.decode_named(plan.control, shapes)

    def correct(self, name: str, parameter: torch.Tensor) -> None:
        """To this parameter's gradient comes c - cᵢ."""
        assert parameter.grad is not None
        mean, own = self._mean[name], self._own.get(name)
        parameter.grad.add_((mean if own is None else mean - own).to(parameter.grad))

    def end(self, round: int, crossed: Tensors | None) -> None:
        """The round is over.

        Args:
            crossed: the update as the root gets it; None: nothing of it crosses.
        """
        self._round = round
        self._due = {
            name: -self._mean[name].double() - change.double().cpu() / self._way
            for name, change in (crossed or {}).items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {"own": dict(self._own), "due": dict(self._due), "round": self._round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave, or of a silo that starts afresh nothing."""
        self._own, self._due = dict(state.get("own", {})), dict(state.get("due", {}))
        self._round = state.get("round", 0)


def control_of(recipe: Recipe, name: str) -> Control | None:
    """As this recipe wants it."""
    return Control(recipe, name) if recipe.federation.control == "scaffold" else None
