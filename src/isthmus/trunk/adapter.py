"""The trunk's adapters: one shared by all silos, or a replica for each silo over the same base weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from isthmus.model import adapters
from isthmus.model.cut import Part
from isthmus.model.optim import build_optimizer, set_rate
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
        self, gradients: Mapping[str, tuple[float, Gradients | None]], *, together: bool, rate: float | None = None
    ) -> None:
        """Take one optimizer step, with gradients of at most ``train.max_grad_norm``.

        Args:
            gradients: for each silo, its weight (supervised tokens; 0 without gradients) and its mean gradients over
                them; None if it has none.
            together: whether these silos waited for one another at this step.
            rate: the step's learning rate; None: the recipe's ``train.learning_rate``.
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
    """One adapter and one optimizer; a step uses the mean of the silos' gradients, weighted by supervised tokens."""

    def __init__(self, part: Part, train: TrainSection) -> None:
        self._part = part
        self._train = train
        self._named = adapters.trainable(part)
        self._optimizer = build_optimizer(self._named.values(), train)
        self._version = 0

    def leaves(self, silo: str) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().requires_grad_() for name, parameter in self._named.items()}

    def version(self, silo: str) -> int:
        return self._version

    def steps_together(self, step: int) -> bool:
        return True

    def step(
        self, gradients: Mapping[str, tuple[float, Gradients | None]], *, together: bool, rate: float | None = None
    ) -> None:
        total = sum(weight for weight, _ in gradients.values())
        if not total:  # without gradients, momentum alone must not move the adapter
            return
        shares = [(weight / total, own) for _, (weight, own) in sorted(gradients.items()) if own is not None]
        means: Gradients = [torch.zeros_like(parameter) for parameter in self._named.values()]
        for share, own in shares:  # foreach operations: few kernel launches for all tensors
            means = list(torch._foreach_add(means, list(torch._foreach_mul(own, share))))
        for parameter, mean in zip(self._named.values(), means, strict=True):
            parameter.grad = mean
        set_rate(self._optimizer, self._train.learning_rate if rate is None else rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._version += 1

    def begin(self) -> None: ...

    def state(self) -> dict[str, Any]:
        return {"adapter": adapters.adapter_of(self._part), "optimizer": self._optimizer.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        adapters.load_adapter(self._part, state["adapter"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._version += 1


@dataclass
class Replica:
    """One silo's own adapter."""

    named: dict[str, torch.nn.Parameter]
    """Trainable parameters by their name in the uncut model."""
    base: dict[str, torch.Tensor]
    """The mean adapter from which the silo last started."""
    optimizer: torch.optim.Optimizer
    weight: float = 0.0
    """Supervised tokens since that start."""
    version: int = 0
    """Number of changes of the parameters."""


class ReplicaAdapters:
    """An adapter and an optimizer for each silo, averaged by supervised tokens every ``every`` steps.

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
        self, gradients: Mapping[str, tuple[float, Gradients | None]], *, together: bool, rate: float | None = None
    ) -> None:
        for silo, (weight, own) in gradients.items():
            replica = self._replica(silo)
            if own is not None:
                for parameter, gradient in zip(replica.named.values(), own, strict=True):
                    parameter.grad = gradient
                set_rate(replica.optimizer, self._train.learning_rate if rate is None else rate)
                replica.optimizer.step()
                replica.optimizer.zero_grad()
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
            optimizer = build_optimizer(named.values(), self._train)
            if silo in self._optimizers:
                optimizer.load_state_dict(self._optimizers[silo])
            self._replicas[silo] = Replica(named, base, optimizer, version=self._loads * 2**32)
        return self._replicas[silo]


def full_adapter(part: Part, leaves: Mapping[str, torch.Tensor]) -> Adapter:
    """All adapter tensors of the part by uncut name: ``leaves`` for the trainable ones, the part's own for the
    frozen."""
    frozen = {name: one for name, one in adapters.adapter_parameters(part).items() if not one.requires_grad}
    return {**frozen, **leaves}
