"""The trunk's adapters: one shared by all silos, or a replica for each silo over the same base weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from isthmus.model import adapters
from isthmus.model.cut import Part
from isthmus.model.optim import build_optimizer, restore_optimizer, set_rate
from isthmus.model.optimizer_settings import OptimizerSettings
from isthmus.recipe import TrainSection
from isthmus.trunk.grouped_lora import Adapter

Gradients = list[torch.Tensor]
"""Gradients of the trainable parameters, one tensor each, in the order of their names."""


class TrunkAdapter(Protocol):
    """The trunk's adapter during training. Inference uses the part's own parameters."""

    def leaves(self, silo: str) -> dict[str, torch.Tensor]:
        """The silo's trainable tensors for one pass, as new autograd leaves, by their name in the uncut model."""
        ...

    def version(self, silo: str) -> int:
        """A number that changes whenever the silo's tensors change."""
        ...

    def steps_together(self, step: int) -> bool:
        """Whether all silos take this optimizer step of a round together."""
        ...

    def step(
        self,
        gradients: Mapping[str, tuple[float, Gradients | None]],
        *,
        together: bool,
        rate: float | None = None,
        settings: OptimizerSettings | None = None,
    ) -> None:
        """Take one optimizer step, with gradients of at most ``train.max_grad_norm`` if the optimizer is the recipe's.

        Args:
            gradients: for each silo, its weight (answers' tokens; 0 without gradients) and its mean gradients over
                them; None if it has none.
            together: whether these silos waited for one another at this step.
            rate: the step's learning rate; None: the recipe's ``train.learning_rate``.
            settings: the optimizer to step with; None: the recipe's. An optimizer of another kind starts anew.
        """
        ...

    def begin(self) -> None:
        """Start a round: discard the silos' steps since they last stepped together."""
        ...

    def state(self) -> dict[str, Any]:
        """The state from which a restarted trunk continues (see ``load``)."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one that ``state`` returned."""
        ...


class SharedAdapter:
    """One adapter and one optimizer; a step uses the mean of the silos' gradients, weighted by answers' tokens.

    Args:
        passed: the blocks that each silo's tokens pass, by their indices in the part; of other silos all. A tensor's
            mean is of those silos that pass its block.
    """

    def __init__(self, part: Part, train: TrainSection, passed: Mapping[str, range] | None = None) -> None:
        self._part = part
        self._train = train
        self._named = adapters.trainable(part)
        self._optimizer = SteppingOptimizer(self._named.values(), train)
        self._version = 0
        self._keepers = {name: self._who_keeps(name, passed or {}) for name in self._named}

    def between(self) -> dict[str, torch.nn.Parameter]:
        """The trainable tensors of blocks that some silos keep themselves, by uncut name."""
        return {name: one for name, one in self._named.items() if self._keepers[name]}

    def keepers(self, name: str) -> frozenset[str]:
        """The silos that keep this tensor's block themselves."""
        return self._keepers[name]

    def replace(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace these tensors; the optimizer's state stays."""
        adapters.load_adapter(self._part, tensors)
        self._version += 1

    def _who_keeps(self, name: str, passed: Mapping[str, range]) -> frozenset[str]:
        block = adapters.block_of(self._part, name)
        if block is None:
            return frozenset()
        return frozenset(silo for silo, blocks in passed.items() if block - self._part.first_block not in blocks)

    def leaves(self, silo: str) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().requires_grad_() for name, parameter in self._named.items()}

    def version(self, silo: str) -> int:
        return self._version

    def steps_together(self, step: int) -> bool:
        return True

    def step(
        self,
        gradients: Mapping[str, tuple[float, Gradients | None]],
        *,
        together: bool,
        rate: float | None = None,
        settings: OptimizerSettings | None = None,
    ) -> None:
        total = sum(weight for weight, _ in gradients.values())
        if not total:  # without gradients, momentum alone must not move the adapter
            return
        weights = {silo: weight for silo, (weight, _) in sorted(gradients.items())}
        totals = [
            sum(weight for silo, weight in weights.items() if silo not in self._keepers[name]) for name in self._named
        ]
        means: Gradients = [torch.zeros_like(parameter) for parameter in self._named.values()]
        for silo, (weight, own) in sorted(gradients.items()):  # foreach operations: few kernel launches for all tensors
            if own is not None:
                shares = [
                    weight / passing if passing and silo not in self._keepers[name] else 0.0
                    for name, passing in zip(self._named, totals, strict=True)
                ]
                means = list(torch._foreach_add(means, list(torch._foreach_mul(own, shares))))
        for parameter, mean, passing in zip(self._named.values(), means, totals, strict=True):
            parameter.grad = mean if passing else None  # what nobody passed rests, as does its momentum
        self._optimizer.step(rate, settings)
        self._version += 1

    def begin(self) -> None: ...

    def state(self) -> dict[str, Any]:
        return {"adapter": adapters.adapter_of(self._part), "optimizer": self._optimizer.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        adapters.load_adapter(self._part, state["adapter"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._version += 1


class SteppingOptimizer:
    """The optimizer of an adapter: the recipe's, or in open rounds that of the silos' own parameters.

    Args:
        parameters: of the adapter.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], train: TrainSection) -> None:
        self._parameters = list(parameters)
        self._train = train
        self._followed: OptimizerSettings | None = None
        self._optimizer = build_optimizer(self._parameters, train)

    def step(self, rate: float | None, settings: OptimizerSettings | None) -> None:
        """Take a step and drop the gradients.

        Args:
            rate: the learning rate of a step of the recipe's optimizer; None: ``train.learning_rate``.
            settings: the optimizer, which starts anew if it is another than before; None: the recipe's.
        """
        self._follow(settings)
        if settings is None:
            set_rate(self._optimizer, self._train.learning_rate if rate is None else rate)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The state, with the settings if they are not the recipe's."""
        state: dict[str, Any] = self._optimizer.state_dict()
        return state if self._followed is None else {**state, "followed": asdict(self._followed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one that ``state_dict`` returned."""
        followed = state.get("followed")
        self._follow(None if followed is None else OptimizerSettings(**followed))
        restore_optimizer(self._optimizer, {key: state[key] for key in ("state", "param_groups")})

    def _follow(self, settings: OptimizerSettings | None) -> None:
        if settings is None:
            if self._followed is not None:
                self._optimizer = build_optimizer(self._parameters, self._train)
        elif self._followed is not None and settings.fits(self._optimizer):  # the recipe's would clip
            settings.apply(self._optimizer)
        else:
            self._optimizer = settings.optimizer(self._parameters)
        self._followed = settings


@dataclass
class Replica:
    """One silo's own adapter."""

    named: dict[str, torch.nn.Parameter]
    """Trainable parameters by their name in the uncut model."""
    base: dict[str, torch.Tensor]
    """The mean adapter from which the silo last started."""
    optimizer: SteppingOptimizer
    weight: float = 0.0
    """Supervised tokens since that start."""
    version: int = 0
    """Number of changes of the parameters."""


class ReplicaAdapters:
    """An adapter and an optimizer for each silo, averaged by answers' tokens every ``every`` steps.

    LoRA's A is frozen and equal for all, so the mean of the B gives exactly the mean of the products BA (FFA-LoRA, Sun
    et al. 2024). A silo that is late for an average keeps its steps and contributes them to the next.

    Args:
        every: steps between averages; the last of ``train.steps`` always averages.
    """

    def __init__(self, part: Part, train: TrainSection, every: int) -> None:
        self._part = part
        self._train = train
        self._every = every
        self._mean = adapters.trainable(part)
        self._replicas: dict[str, Replica] = {}
        self._optimizers: dict[str, Any] = {}
        """Optimizer states loaded from disk, by silo."""
        self._loads = 0

    def leaves(self, silo: str) -> dict[str, torch.Tensor]:
        # Copies: a silo may step alone while other silos still need the graph of a pass that includes its tokens.
        return {name: one.detach().clone().requires_grad_() for name, one in self._replica(silo).named.items()}

    def version(self, silo: str) -> int:
        return self._replica(silo).version

    def steps_together(self, step: int) -> bool:
        return step >= self._train.steps or step % self._every == 0

    def step(
        self,
        gradients: Mapping[str, tuple[float, Gradients | None]],
        *,
        together: bool,
        rate: float | None = None,
        settings: OptimizerSettings | None = None,
    ) -> None:
        for silo, (weight, own) in gradients.items():
            replica = self._replica(silo)
            if own is not None:
                for parameter, gradient in zip(replica.named.values(), own, strict=True):
                    parameter.grad = gradient
                replica.optimizer.step(rate, settings)
            replica.weight += weight
            replica.version += 1
        if together:
            self._average([self._replica(silo) for silo in sorted(gradients)])

    def begin(self) -> None:
        self._reset(self._replicas.values())

    def state(self) -> dict[str, Any]:
        optimizers = {silo: replica.optimizer.state_dict() for silo, replica in self._replicas.items()}
        return {"adapter": adapters.adapter_of(self._part), "optimizers": self._optimizers | optimizers}

    def load(self, state: Mapping[str, Any]) -> None:
        adapters.load_adapter(self._part, state["adapter"])
        self._optimizers = dict(state["optimizers"])
        self._replicas = {}
        self._loads += 1

    @torch.no_grad()
    def _average(self, contributors: list[Replica]) -> None:
        """Move the part's own adapter by the weighted mean of these replicas' changes, then reset them and all replicas
        without steps to it."""
        total = sum(replica.weight for replica in contributors)
        for name, mean in self._mean.items() if total else ():
            changes = (one.weight / total * (one.named[name] - one.base[name]) for one in contributors)
            mean.add_(sum(changes, torch.zeros_like(mean)))
        idle = [replica for replica in self._replicas.values() if not replica.weight]
        self._reset([*contributors, *idle])

    @torch.no_grad()
    def _reset(self, replicas: Iterable[Replica]) -> None:
        """Reset these replicas to the mean."""
        base = {name: mean.detach().clone() for name, mean in self._mean.items()}
        for replica in replicas:
            for name, parameter in replica.named.items():
                parameter.copy_(base[name])
            replica.base = base
            replica.weight = 0.0
            replica.version += 1

    def _replica(self, silo: str) -> Replica:
        if silo not in self._replicas:
            base = {name: mean.detach().clone() for name, mean in self._mean.items()}
            named = {name: torch.nn.Parameter(one.clone()) for name, one in base.items()}
            optimizer = SteppingOptimizer(named.values(), self._train)
            if silo in self._optimizers:
                optimizer.load_state_dict(self._optimizers[silo])
            self._replicas[silo] = Replica(named, base, optimizer, version=self._loads * 2**32)
        return self._replicas[silo]


def full_adapter(part: Part, leaves: Mapping[str, torch.Tensor]) -> Adapter:
    """All adapter tensors of the part by uncut name: ``leaves`` for the trainable ones, the part's own for the
    frozen."""
    frozen = {name: one for name, one in adapters.adapter_parameters(part).items() if not one.requires_grad}
    return {**frozen, **leaves}
