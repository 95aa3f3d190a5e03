"""The stand-in: the trunk's adapter as an optimizer in the silo sees it. Its step is the trunk's step.

An optimizer that gets the split model's parameters gets the stand-in among them: one parameter of two numbers, which no
forward reads. After every backward its gradient has the L2 norm of the trunk's gradients, so that clipping by the norm
of all gradients (``torch.nn.utils.clip_grad_norm_``) is that of the uncut model, and whatever multiplies or drops the
silo's gradients before the optimizer's step multiplies or drops the trunk's too.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from isthmus.errors import MismatchError, NotSupportedError, ProtocolError
from isthmus.model.optimizer_settings import OptimizerSettings
from isthmus.silo.rounds_client import RoundsClient, SavedRound

DIRECTION = (0.96, 0.28)
"""The stand-in's gradient over its norm: unequal numbers, which show what is not a multiplication."""
STATE = "_extra_state"
"""torch's name for what a module keeps in a state dict beside its tensors."""
log = logging.getLogger(__name__)


class StandIn(nn.Module):
    """The parameter, and what its gradient says about the trunk's.

    Args:
        rounds: client of the trunk's rounds.
        trains: whether gradients cross: without them there is nothing to step.
        exact: whether the factor by which the silo's gradients were clipped may cross. It depends on them, and no noise
            is added to it; otherwise clipping leaves the trunk's gradients as they are.
    """

    def __init__(self, rounds: RoundsClient, *, trains: bool, exact: bool) -> None:
        super().__init__()
        self.lora = StandInParameter(torch.zeros(2), requires_grad=trains)
        self.lora.owner = weakref.ref(self)
        self._rounds = rounds
        self._exact = exact
        self._given: torch.Tensor | None = None
        """The gradient after the last backward; None: the trunk has none of this silo's gradients."""
        self._tokens = self._weight = 0
        """Tokens in the gradients since the last step; and in those of the last step."""
        self._parameters_of_ends: dict[str, weakref.ref[nn.Parameter]] = {}
        self._trained_kinds: set[str] = set()
        """The kinds of tensors, of those that blocks have, that the recipe trains in bottom or top."""
        self._base: dict[str, Any] = {}
        self._versions = 0
        self._settings: OptimizerSettings | None = None
        self._warned = False
        self._due = False
        """Whether there are gradients that no step has used."""

    @property
    def trains(self) -> bool:
        """Whether the trunk's adapter trains: whoever freezes ``lora`` freezes it."""
        return self.lora.requires_grad

    def watch(self, parameters: Mapping[str, nn.Parameter], base: Mapping[str, Any]) -> None:
        """Set what the trunk's state belongs to.

        Args:
            parameters: all that the recipe added to bottom and top, by their names in the uncut model.
            base: what identifies the model: a saved state must have the same.
        """
        self._parameters_of_ends = {name: weakref.ref(parameter) for name, parameter in parameters.items()}
        self._trained_kinds = {_kind(name) for name, parameter in parameters.items() if parameter.requires_grad} - {""}
        self._base = dict(base)

    def check_stepped(self) -> None:
        """Check that bottom and top did not change without a step of the trunk.

        Raises:
            ProtocolError: they did, after a backward whose gradients the trunk still has.
        """
        if self._due and not self._rounds.by_hand and self._count_changes() != self._versions:
            self._due = False
            raise ProtocolError(
                "bottom and top have changed since the last backward, but the trunk was not stepped",
                remedy="give the optimizer all parameters of the model that require a gradient; one is the trunk's",
            )

    @property
    def follows(self) -> bool:
        """Whether a step of the optimizer that holds the stand-in is one of the trunk."""
        return self.trains and not self._rounds.by_hand

    def keep(self) -> float | None:
        """The factor that a backward about to be sent puts on the trunk's gradients so far; None: 1."""
        if self._given is None or not self.follows:
            return None
        factor = self._factor()
        if not factor:
            self._given, self._tokens = None, 0
        elif factor != 1 and self._exact:
            self._given = None if self.lora.grad is None else self.lora.grad.clone()
        else:
            return None
        return factor

    def receive(self, norm: float, tokens: int) -> None:
        """Take over the result of a backward.

        Args:
            norm: L2 norm of the trunk's gradients so far.
            tokens: number of tokens in the backward.
        """
        if not self.follows:
            return
        self._given = torch.tensor([norm * part for part in DIRECTION]).to(self.lora)
        self.lora.grad = self._given.clone()
        self._tokens += tokens
        self._due, self._versions = True, self._count_changes()

    def check_rates(self, groups: Iterable[dict[str, Any]], own: dict[str, Any]) -> None:
        """Check that A and B have the same learning rates: the trunk steps both of its factors with one.

        A group without parameters counts, too: there may be those of a factor that trains on the trunk alone.

        Args:
            groups: the optimizer's parameter groups.
            own: the one of the stand-in.

        Raises:
            NotSupportedError: they have not.
        """
        rates = {id(one): float(group["lr"]) for group in groups for one in group["params"]}
        held = {name: rates.get(id(reference())) for name, reference in self._parameters_of_ends.items()}
        a, b = ({rate for name, rate in held.items() if f"lora_{one}" in name and rate is not None} for one in "AB")
        empty = {float(group["lr"]) for group in groups if not group["params"]} - {float(own["lr"])}
        if (a and b and a != b) or empty:
            raise NotSupportedError(
                "the optimizer has learning rates of their own for A and B (LoRA+), and the trunk takes one for both",
                remedy="give A and B the same learning rate, and leave empty parameter groups out",
            )

    def check_gradients(self) -> None:
        """Check that the trunk's gradients were not left out where those of bottom and top are there.

        Raises:
            NotSupportedError: they were, as by ``torch.autograd.grad``, which does not know them.
        """
        ends = (reference() for reference in self._parameters_of_ends.values())
        if self._due and self.lora.grad is None and any(one is not None and one.grad is not None for one in ends):
            raise NotSupportedError(
                "gradients of bottom and top were set by hand, without the trunk's",
                remedy="compute them with loss.backward(), and drop them with zero_grad() of all parameters",
            )

    def check_kinds(self) -> None:
        """Check that nobody froze a kind of the ends' tensors, such as every A or every v_proj: the trunk's would train
        on. Whole parts may be frozen.

        Raises:
            NotSupportedError: somebody did.
        """
        held = {name: reference() for name, reference in self._parameters_of_ends.items()}
        training = {_kind(name) for name, one in held.items() if one is not None and one.requires_grad}
        frozen = sorted(self._trained_kinds - training)
        if frozen and self._trained_kinds & training:
            raise NotSupportedError(
                f"{', '.join(frozen)} of bottom and top were frozen, and the trunk's train on",
                remedy="leave layers out in the recipe's lora.targets, or freeze whole parts",
            )

    def prepare(self, settings: OptimizerSettings) -> None:
        """Note what an optimizer is about to step the stand-in with."""
        self._settings = settings

    def step(self) -> None:
        """Step the trunk, after the optimizer's step."""
        self._due, settings = False, self._settings
        assert settings is not None
        if self._given is None or self.lora.grad is None:
            self._rounds.step(0, settings, None)
            return
        factor = self._factor()
        if factor != 1 and not self._exact:
            if not self._warned:
                log.warning("the boundary adds noise: gradients are clipped in bottom and top, but not in the trunk")
            self._warned, factor = True, 1.0
        self._weight, self._tokens = self._tokens or self._weight, 0
        self._rounds.step(self._weight, settings, None if factor == 1 else factor)

    def get_extra_state(self) -> torch.Tensor:
        """The saved round that belongs to the present bottom and top, as JSON in bytes. The open round ends with it."""
        self.check_stepped()
        saved = self._rounds.save()
        round = {} if saved is None else {"round": saved.number, "digest": saved.digest.hex()}
        state = {**self._base, **round}
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Nothing: ``restore`` has read the state, before anything of bottom and top was replaced."""

    def restore(self, module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Bring the trunk to the round of a state dict that is about to be loaded: a hook of the whole model.

        Raises:
            MismatchError: the state is not of such a model, or of one with another base or cut.
            NotSupportedError: the state has no round of the trunk.
            ProtocolError: as ``RoundsClient.restore``.
        """
        (name,) = (name for name, one in module.named_modules() if one is self)
        found = state.get(f"{prefix}{name}.{STATE}")
        if found is None:
            raise MismatchError(
                "this state does not say which of the trunk's rounds it belongs to",
                remedy="load what save_pretrained, Trainer or state_dict() of this split model wrote",
            )
        values: dict[str, Any] = json.loads(bytes(found.tolist()))
        for key, own in self._base.items():
            if values.get(key) != own:
                raise MismatchError(
                    f"the saved model has {key} {values.get(key)}, this one {own}",
                    remedy="load it into a model of the same recipe and base",
                )
        if "round" not in values:
            raise NotSupportedError(
                "this state was saved where rounds are begun by hand, without the trunk's",
                remedy="copy its adapters into bottom and top, and begin the trunk's next round with rounds.begin",
            )
        self._rounds.restore(SavedRound(values["round"], bytes.fromhex(values["digest"])))
        self._given, self._due, self._tokens = None, False, 0
        self.lora.grad = None

    def _factor(self) -> float:
        """By what the stand-in's gradient was multiplied since the last backward; 0 if it was dropped.

        Raises:
            NotSupportedError: its two numbers were multiplied by different factors, or by one below 0 or above 1.
        """
        grad, given = self.lora.grad, self._given
        if grad is None:
            return 0.0
        assert given is not None
        if torch.equal(grad, given) or not given.any():
            return 1.0
        factors = (grad.double() / given.double()).tolist()
        if not abs(factors[0] - factors[1]) <= 8 * torch.finfo(grad.dtype).eps * abs(factors[0]):
            raise NotSupportedError(
                "gradients were changed in another way than by a common factor, which the trunk cannot follow",
                remedy="clip by norm (max_grad_norm), not by value",
            )
        if not 0 <= factors[0] <= 1:
            raise NotSupportedError(
                f"gradients were multiplied by {factors[0]:g}, the trunk's may be made smaller alone",
                remedy="multiply the loss before loss.backward()",
            )
        return float(factors[0])

    def _count_changes(self) -> int:
        alive = (reference() for reference in self._parameters_of_ends.values())
        return sum(parameter._version for parameter in alive if parameter is not None)


def _kind(name: str) -> str:
    """Layer and factor of a tensor that every block has, such as ``q_proj.lora_A``; empty: it is of no block."""
    *path, layer, factor, _ = ["", "", *name.split(".")]
    return f"{layer}.{factor}" if any(map(str.isdecimal, path)) and "lora_" in factor else ""


class StandInParameter(nn.Parameter):
    """The stand-in's parameter, by which an optimizer that holds it is recognized."""

    owner: weakref.ref[StandIn]


def _held(optimizer: torch.optim.Optimizer) -> Iterable[tuple[StandIn, dict[str, Any]]]:
    """The stand-ins among an optimizer's parameters whose steps are the trunk's, and the parameter group of each."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter, StandInParameter):
                owner = parameter.owner()
                if owner is not None and owner.follows:
                    yield owner, group


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Check that the trunk can follow, before the optimizer changes anything."""
    for owner, group in _held(optimizer):
        owner.check_gradients()
        owner.check_kinds()
        owner.check_rates(optimizer.param_groups, group)
        owner.prepare(OptimizerSettings.of(optimizer, group, owner.lora))


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for owner, _group in _held(optimizer):
        owner.step()


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
