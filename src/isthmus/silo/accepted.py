"""The shared adapters that a silo has accepted, and how far the next ones may be from them.

Shapes: P numbers of all shared tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from isthmus.errors import ProtocolError
from isthmus.recipe import FederationSection, OptimizerSection, Recipe
from isthmus.silo.served import SharedAdapters, same_run
from isthmus.storage.record import RoleDirectory
from isthmus.wire import isthmus_pb2 as pb

Tensors = Mapping[str, torch.Tensor]
MACHINES_DIFFER = 1e-5
"""Relative difference of the same numbers computed on two machines."""
ADAMW_BETAS = (0.9, 0.999)
"""β₁ and β₂ of ``train.optimizer = "adamw"``, which are torch's."""
FAR_TAIL = 6.0
"""The norm of P standard normal numbers is above √P plus this once in 10⁸ rounds."""


class AcceptedAdapters:
    """Checks the adapters of a round before a silo computes with them.

    The silo knows those that all parties start from. Rounds that finished since may have changed these, and the last
    ones that it accepted, by ``federation.max_change`` each, and no more: so in a whole run no root moves what crosses
    further than ``train.rounds`` times that, whatever rounds it claims or goes back to.

    Args:
        initial: the tensors that the run starts with, by uncut name.
        directory: the silo's, which holds the last ones that it accepted; None: only the initial ones are known.
    """

    def __init__(self, recipe: Recipe, initial: Tensors, directory: RoleDirectory | None = None) -> None:
        self._start = {name: tensor.detach().cpu().clone() for name, tensor in initial.items()}
        self._rounds, self._stated = recipe.train.rounds, recipe.federation.max_change is not None
        self.bound = max_change(recipe, sum(tensor.numel() for tensor in initial.values()))
        """Largest L2 norm of one round's change; None: neither set nor implied by the recipe."""
        self._last = None if directory is None else _kept(directory)

    def accept(self, shared: SharedAdapters) -> None:
        """These are the silo's adapters from now on.

        Raises:
            ProtocolError: there cannot be so many rounds, or the adapters are further from the initial ones, or from
                the last, than their rounds may have changed them. The last ones stay accepted.
        """
        if not 0 <= shared.completed <= self._rounds:
            raise ProtocolError(
                f"adapters of round {shared.completed} of {self._rounds}", remedy="give all parties one recipe"
            )
        if self.bound is not None:
            self._check(self._start, 0, shared, self.bound)
            if self._last is not None and same_run(self._last.run, shared.run):
                self._check(self._last.tensors, self._last.completed, shared, self.bound)
        self._last = shared

    def _check(self, before: Tensors, completed: int, shared: SharedAdapters, bound: float) -> None:
        rounds = abs(shared.completed - completed)
        found = distance(before, shared.tensors)
        if not found <= rounds * bound + MACHINES_DIFFER * (1 + _norm(before)):  # what is no number, too
            source = "federation.max_change" if self._stated else "which the recipe implies, without max_change"
            raise ProtocolError(
                f"the adapters of round {shared.completed} are {found:.4g} away from those of round {completed}; "
                f"this silo accepts {rounds * bound:.4g}: {bound:.4g} a round ({source})",
                remedy="leave this root; if its rounds were honest, raise federation.max_change. Started again, the "
                "silo goes on from the adapters that it accepted last",
            )


def check_round(plan: pb.Plan, rounds: int) -> None:
    """Check that a plan is for the round that follows its adapters, and one of the recipe's; or for none.

    Any other number would be the name of the silo's own saved state, in place of earlier ones, and of other rates.

    Args:
        rounds: of the recipe.

    Raises:
        ProtocolError: it is for another round.
    """
    if plan.round and (plan.round != plan.completed + 1 or plan.round > rounds):
        raise ProtocolError(
            f"a plan for round {plan.round} of {rounds} with the adapters after round {plan.completed}",
            remedy="leave this root, or give all parties one recipe",
        )


def distance(one: Tensors, other: Tensors) -> float:
    """The L2 norm of the difference of tensors of the same names and shapes, all together."""
    return _norm({name: tensor.double() - one[name].double() for name, tensor in other.items()})


def max_change(recipe: Recipe, count: int) -> float | None:
    """Largest L2 norm of one round's change of P shared numbers: the recipe's own, or what an honest round cannot
    exceed; None where the recipe bounds nothing.

    The mean of clipped updates is no longer than the clip and their noise; under masks no number of it is above the
    range. Momentum β adds up to 1/(1 - β) of such steps. A scaled step is within the rate for each number with
    adagrad, and by Cauchy and Schwarz within (1 - β₁)/√((1 - β₂)(1 - β₁²/β₂)) of it with adam. A step with gradients
    is one of AdamW, within the same of its rate, or of SGD with a mean that ``train.max_grad_norm`` shortens; the decay
    of weights is not bounded.

    Args:
        count: P.
    """
    federation, optimizer = recipe.federation, recipe.federation.optimizer
    if federation.max_change is not None:
        return federation.max_change
    if recipe.sends_gradients:
        return _stepped(recipe, federation, count)
    endless = optimizer.kind == "adam" and optimizer.momentum**2 >= optimizer.second_momentum
    if federation.lora == "svd" or optimizer.kind == "yogi" or endless:
        return None
    if optimizer.kind in ("adam", "adagrad"):
        return _scaled(optimizer) * math.sqrt(count)
    mean = _mean(recipe, federation, count)
    if mean is None or optimizer.kind == "none":
        return mean
    return optimizer.rate * mean / (1 - optimizer.momentum)


def max_mean(recipe: Recipe, count: int) -> float | None:
    """Largest L2 norm of the mean of a round's updates of P numbers: as the recipe's clip or range imply, or as the
    change of the shared adapters, which ``federation.max_change`` bounds, leaves to it; None where neither says.

    With momentum β and the rate r, a change is r times a velocity v, and a mean is v - β times the one before.

    Args:
        count: P.
    """
    federation, optimizer = recipe.federation, recipe.federation.optimizer
    found = [_mean(recipe, federation, count)]
    if federation.max_change is not None and optimizer.kind == "none":
        found.append(federation.max_change)
    elif federation.max_change is not None and optimizer.kind == "momentum":
        found.append(federation.max_change * (1 + optimizer.momentum) / optimizer.rate)
    return min((one for one in found if one is not None), default=None)


def _mean(recipe: Recipe, federation: FederationSection, count: int) -> float | None:
    """Largest L2 norm of the mean of a round's updates; None: not bounded, or by a rule or an error of compression."""
    compression, update = federation.compression, recipe.boundary.update
    plain = compression.kind == "none" and federation.noise is None and not federation.robust.active
    if not plain or federation.asynchronous.buffer is not None or recipe.trains_between or recipe.model.moves:
        return None  # of what the trunk changed no clip is known
    if federation.secure.masks:
        return federation.secure.range * math.sqrt(count)
    if not update.clip or update.mechanism != "gaussian" or not compression.exact:
        return None
    return update.clip + update.noise * (math.sqrt(count) + FAR_TAIL)


def _stepped(recipe: Recipe, federation: FederationSection, count: int) -> float | None:
    """Largest L2 norm of one step with gradients."""
    train = recipe.train
    if train.weight_decay:
        return None
    if train.optimizer == "adamw":
        return train.learning_rate * _ratio(*ADAMW_BETAS) * math.sqrt(count)
    bounds = [one for one in (train.max_grad_norm, _mean(recipe, federation, count)) if one is not None]
    return train.learning_rate * min(bounds) / (1 - train.momentum) if bounds else None


def _scaled(optimizer: OptimizerSection) -> float:
    """Largest step of one number with adagrad or adam."""
    if optimizer.kind == "adagrad":
        return optimizer.rate
    return optimizer.rate * _ratio(optimizer.momentum, optimizer.second_momentum)


def _ratio(beta1: float, beta2: float) -> float:
    """Largest ratio of the mean of earlier numbers to the root of the mean of their squares. With corrections of bias
    it is no larger: these are at most 1 together, where β₁² < β₂."""
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))


def _norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def _kept(directory: RoleDirectory) -> SharedAdapters | None:
    """The last adapters that the silo accepted; None before the first round."""
    number = directory.shared.last_round()
    if not number:
        return None
    state = directory.shared.load_round(number)
    return SharedAdapters(number, state.get("run", ""), state["shared"])
