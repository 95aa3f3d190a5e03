"""Whose adapter a silo's tokens go through: one that all share, or each silo's own over the one base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from isthmus.model import adapters
from isthmus.model.cut import Part
from isthmus.model.optim import build_optimizer
from isthmus.recipe import TrainSection
from isthmus.trunk.grouped_lora import Adapter

Gradients = list[torch.Tensor]
"""One tensor a trainable parameter, in the order of their names."""


class TrunkAdapter(Protocol):
    """The trunk's adapter as training sees it. The part's own parameters are what inference uses."""

    def leaves(self, silo: str) -> dict[str, torch.Tensor]:
        """The trainable tensors for one pass of this silo, as autograd leaves of their own, by uncut name."""
        ...

    def version(self, silo: str) -> int:
        """Changes whenever the values of this silo's tensors do."""
        ...

    def waits(self, step: int) -> bool:
        """Whether the silos step together at this optimizer step of a round."""
        ...

    def step(self, gradients: Mapping[str, tuple[float, Gradients | None]], *, together: bool) -> None:
        """One optimizer step.

        Args:
            gradients: of each silo, its weight (supervised tokens; 0 if it has none) and the mean over its tokens.
            together: these silos waited for one another at this step.
        """
        ...

    def begin(self) -> None:
        """A round begins: what silos did since they last stepped together is dropped."""
        ...

    def state(self) -> dict[str, Any]:
        """What a stopped trunk needs to go on."""
        ...

    def load(self, state: Mapping[str, Any]) -> None: ...


class SharedAdapter:
    """One adapter and one optimizer; a step takes the silos' weighted mean gradient."""

    def __init__(self, part: Part, train: TrainSection) -> None:
        self._part = part
        self._named = adapters.trainable(part)
        self._optimizer = build_optimizer(self._named.values(), train)
        self._version = 0

    def leaves(self, silo: str) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().requires_grad_() for name, parameter in self._named.items()}

    def version(self, silo: str) -> int:
        return self._version

    def waits(self, step: int) -> bool:
        return True

    def step(self, gradients: Mapping[str, tuple[float, Gradients | None]], *, together: bool) -> None:
        total = sum(weight for weight, _ in gradients.values())
        if not total:  # momentum alone is no step
            return
        shares = [(weight / total, held) for _, (weight, held) in sorted(gradients.items()) if held is not None]
        means: Gradients = [torch.zeros_like(parameter) for parameter in self._named.values()]
        for share, held in shares:  # all tensors in a few kernels, where the device has such
            means = list(torch._foreach_add(means, list(torch._foreach_mul(held, share))))
        for parameter, mean in zip(self._named.values(), means, strict=True):
            parameter.grad = mean
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
    base: dict[str, torch.Tensor]
    """The mean that it set out from."""
    optimizer: torch.optim.Optimizer
    weight: float = 0.0
    """Supervised tokens since then."""
    version: int = 0


class ReplicaAdapters:
    """An adapter and an optimizer for each silo, averaged by supervised tokens every so many steps.

    A is frozen and the same for all, so that the mean of the B is exactly the mean of what they do (FFA-LoRA). A silo
    that is late for an average keeps what it did, and brings it to the next.

    Args:
        every: steps from one average to the next; the last of ``train.steps`` always averages.
    """

    def __init__(self, part: Part, train: TrainSection, every: int) -> None:
        self._part = part
        self._train = train
        self._every = every
        self._mean = adapters.trainable(part)
        self._replicas: dict[str, Replica] = {}
        self._optimizers: dict[str, Any] = {}
        """States of optimizers from before the trunk was stopped."""
        self._loads = 0

    def leaves(self, silo: str) -> dict[str, torch.Tensor]:
        # Copies: a silo may step alone while others still need the graph of a pass that its tokens were in.
        return {name: one.detach().clone().requires_grad_() for name, one in self._replica(silo).named.items()}

    def version(self, silo: str) -> int:
        return self._replica(silo).version

    def waits(self, step: int) -> bool:
        return step >= self._train.steps or step % self._every == 0

    def step(self, gradients: Mapping[str, tuple[float, Gradients | None]], *, together: bool) -> None:
        for silo, (weight, held) in gradients.items():
            replica = self._replica(silo)
            if held is not None:
                for parameter, gradient in zip(replica.named.values(), held, strict=True):
                    parameter.grad = gradient
                replica.optimizer.step()
                replica.optimizer.zero_grad()
            replica.weight += weight
            replica.version += 1
        if together:
            self._average([self._replica(silo) for silo in sorted(gradients)])

    def begin(self) -> None:
        self._follow(self._replicas.values())

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
        """The part's own adapter moves by the weighted mean of how far these did; they and all that rest follow it."""
        total = sum(replica.weight for replica in contributors)
        for name, mean in self._mean.items() if total else ():
            ways = (one.weight / total * (one.named[name] - one.base[name]) for one in contributors)
            mean.add_(sum(ways, torch.zeros_like(mean)))
        resting = [replica for replica in self._replicas.values() if not replica.weight]
        self._follow([*contributors, *resting])

    @torch.no_grad()
    def _follow(self, replicas: Iterable[Replica]) -> None:
        """These become the mean."""
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


def whole_adapter(part: Part, leaves: Mapping[str, torch.Tensor]) -> Adapter:
    """These trainable tensors and the part's frozen ones."""
    frozen = {name: one for name, one in adapters.parameters(part).items() if not one.requires_grad}
    return {**frozen, **leaves}
