"""SCAFFOLD's control variates in a silo (Karimireddy et al. 2020, option II): they correct its gradients' drift.

Letters: c the mean of all silos' controls, cᵢ this silo's, x what a round begins with, yᵢ what the silo makes of it in
K steps of the rate η. Each step goes by g - cᵢ + c, and the round changes cᵢ by (x - yᵢ) / Kη - c: by nothing but the
update and the plan. So the root computes the change of c from the mean of the updates, and no silo sends
more than its update. This silo computes its own from the update as it crossed, clipped, noised and rounded: then c
stays the mean of the cᵢ, and no noise adds up over the rounds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from isthmus.errors import FrameError, ProtocolError
from isthmus.recipe import Recipe
from isthmus.silo.accepted import MACHINES_DIFFER, max_mean
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb

Tensors = Mapping[str, torch.Tensor]
log = logging.getLogger(__name__)


class SiloControl:
    """The control variates c and cᵢ of one silo, by the tensors' uncut names.

    A round's change of cᵢ is pending until a plan says that the root counted it: an update that was lost on its way
    must not be in cᵢ either.

    A root that lies about c would move what the silo trains by Kη |c - cᵢ| a round, whatever the silo's data. Of rounds
    whose mean update is no longer than B, c is no longer than B / Kη: zero at first, and then between what it was and
    such a mean over -Kη. So a longer one is refused.

    Args:
        most: B, as an L2 norm; None: the recipe bounds no round's mean update.
    """

    def __init__(self, recipe: Recipe, name: str, most: float | None = None) -> None:
        self._name = name
        self._reach = recipe.train.learning_rate * recipe.mean_reach(1)
        """Kη."""
        self._longest = math.inf if most is None else most / self._reach
        """Largest L2 norm of c."""
        self._mean: dict[str, torch.Tensor] = {}
        self._own: dict[str, torch.Tensor] = {}
        self._pending: dict[str, torch.Tensor] = {}
        """The last round's change of cᵢ, until the root has counted it, fp64."""
        self._round = 0
        """The number of that round."""

    def begin(self, plan: pb.Plan, trained: Tensors) -> None:
        """A round of these tensors begins.

        Raises:
            FrameError: the plan's control is not of just these, or is not finite.
            ProtocolError: it is longer than honest rounds can have made it. The silo's own stays as it was.
        """
        mean = self._checked(plan, trained)
        counted = plan.counted.get(self._name, 0)
        if self._pending and counted == self._round:
            for name, change in self._pending.items():
                own = self._own.get(name, torch.zeros_like(change))
                self._own[name] = (own.double() + change).float()
        elif counted > self._round:
            log.warning("the root knows this silo's control of round %d, the silo does not: it starts afresh", counted)
        self._pending = {}
        self._mean = mean

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

    def _checked(self, plan: pb.Plan, trained: Tensors) -> dict[str, torch.Tensor]:
        """The plan's c, unless an honest root cannot have sent it."""
        try:
            mean = codec.decode_named(plan.control, {name: tuple(one.shape) for name, one in trained.items()})
        except FrameError as error:
            raise FrameError(f"the plan's control: {error.message}", remedy=error.remedy) from error
        norm = math.sqrt(sum(float(one.double().square().sum()) for one in mean.values()))
        if not norm <= self._longest * (1 + MACHINES_DIFFER):
            raise ProtocolError(
                f"the control of round {plan.round} has the norm {norm:.4g}; this silo accepts {self._longest:.4g}, "
                "since no mean update may be longer than the recipe lets it (federation.max_change, clip or range)",
                remedy="leave this root; if its rounds were honest, raise federation.max_change. Started again, the "
                "silo goes on from its last round",
            )
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {"own": dict(self._own), "due": dict(self._pending), "round": self._round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave; an empty state is that of a silo without earlier rounds."""
        self._own, self._pending = dict(state.get("own", {})), dict(state.get("due", {}))
        self._round = state.get("round", 0)


def silo_control(recipe: Recipe, name: str, count: int) -> SiloControl | None:
    """The control variates of a recipe with SCAFFOLD; None: the recipe has none.

    Args:
        count: of all numbers that the silo shares.
    """
    if recipe.federation.control != "scaffold":
        return None
    return SiloControl(recipe, name, max_mean(recipe, count))
