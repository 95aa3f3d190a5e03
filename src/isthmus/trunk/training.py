"""Training state of the trunk: open steps, each silo's gradients, and the one adapter they step together.

Shapes: T tokens of all sequences one after another, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from isthmus.errors import FrameError, OutOfOrderError, ProtocolError, RunError, UnknownStepError
from isthmus.model import adapters
from isthmus.model.optim import build_optimizer
from isthmus.recipe import TrainSection
from isthmus.report.record import RoleDirectory
from isthmus.trunk.runner import Runner

OPEN_STEPS = 64
"""Forwards a silo may have waiting for their backward."""


@dataclass
class OpenStep:
    """A forward whose backward has not come."""

    input_TD: torch.Tensor
    output_TD: torch.Tensor
    lengths: list[int]
    version: int
    """Of the adapter that computed it."""


@dataclass
class SiloState:
    """What one silo has under way."""

    last_step: int = 0
    open: dict[int, OpenStep] = field(default_factory=dict)
    gradients: list[torch.Tensor] | None = None
    """Sum over the backwards since the last optimizer step, one tensor a parameter."""


class Training:
    """Forward and backward for each silo, one optimizer step for all.

    Args:
        store: where the state after each round is kept; round 0 is the untrained adapter.
    """

    def __init__(self, runner: Runner, train: TrainSection, store: RoleDirectory) -> None:
        self._runner = runner
        self._store = store
        self._named = adapters.trainable(runner.part)
        self._parameters = list(self._named.values())
        self._optimizer = build_optimizer(self._parameters, train)
        self._silos: dict[str, SiloState] = {}
        self._version = 0
        self._round: int | None = 0
        """The round whose end this state is; None within a round."""
        if store.rounds():
            self._load(store.last_round())
        else:
            self.save(0)

    def forget(self, peer: str) -> None:
        """Drop what a silo has open: its process is a new one."""
        self._silos.pop(peer, None)

    def evaluate(self, h_TD: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self._runner.whole(h_TD, lengths)

    def forward(self, peer: str, step: int, h_TD: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Run a training step's forward and keep its graph.

        Raises:
            OutOfOrderError: the step's number is not above the silo's last one.
            ProtocolError: too many steps wait for their backward.
        """
        silo = self._silos.setdefault(peer, SiloState())
        if step <= silo.last_step:
            raise OutOfOrderError(f"step {step} after step {silo.last_step}", remedy="number steps upwards")
        if len(silo.open) >= OPEN_STEPS:
            raise ProtocolError(f"{OPEN_STEPS} steps without a backward", remedy="evaluate without gradients")
        opened = silo.open[step] = self._run(h_TD, lengths)
        silo.last_step = step
        return opened.output_TD.detach()

    def backward(self, peer: str, step: int, gradient_TD: torch.Tensor, *, reply: bool) -> torch.Tensor | None:
        """Run a step's backward; its parameter gradients join the silo's sum.

        Returns:
            The gradient of the step's input if ``reply``.

        Raises:
            UnknownStepError: no such step is open.
            FrameError: the gradient is so large that the parameters' overflow; the step stays open.
        """
        silo = self._silos.get(peer, SiloState())
        opened = self.open_step(peer, step)
        if opened.version != self._version:  # the others stepped without this silo: its graph is of old weights
            opened = self._run(opened.input_TD.detach(), opened.lengths)
        inputs = [opened.input_TD, *self._parameters] if reply else self._parameters
        found = torch.autograd.grad(opened.output_TD, inputs, gradient_TD.to(opened.output_TD))
        gradients = list(found[1:] if reply else found)
        if silo.gradients is not None:
            gradients = list(torch._foreach_add(silo.gradients, gradients))
        if not torch.stack([gradient.isfinite().all() for gradient in gradients]).all():
            silo.open[step] = self._run(opened.input_TD.detach(), opened.lengths)
            raise FrameError(f"the gradients of step {step} overflow", remedy="lower the learning rate")
        del silo.open[step]
        silo.gradients = gradients
        return found[0] if reply else None

    def open_step(self, peer: str, step: int) -> OpenStep:
        """The silo's forward that waits for its backward."""
        opened = self._silos.get(peer, SiloState()).open.get(step)
        if opened is None:
            raise UnknownStepError(
                f"no step {step} is open here", remedy="start the round again: 'isthmus run --resume'"
            )
        return opened

    def step(self, weights: Mapping[str, float]) -> None:
        """One optimizer step on the weighted mean of these silos' gradients; weights are supervised tokens."""
        total = sum(weights.values())
        shares = [
            (weight / total, self._silos[peer].gradients)
            for peer, weight in sorted(weights.items())
            if peer in self._silos and self._silos[peer].gradients is not None
        ]
        for number, parameter in enumerate(self._parameters):
            parameter.grad = sum((share * held[number] for share, held in shares if held), torch.zeros_like(parameter))
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._version += 1
        self._round = None
        for peer in weights:
            if peer in self._silos:
                self._silos[peer].gradients = None
                self._silos[peer].open.clear()

    def save(self, number: int) -> None:
        """Keep the state as the end of this round."""
        adapter = {name: parameter.detach() for name, parameter in self._named.items()}
        frozen = adapters.adapter_of(self._runner.part)
        self._store.save_round(number, {"adapter": {**frozen, **adapter}, "optimizer": self._optimizer.state_dict()})
        self._round = number

    def restore(self, number: int) -> None:
        """Go back to the end of this round, unless the state is just that; what silos had under way is dropped.

        Raises:
            ProtocolError: that round never ended here.
        """
        for silo in self._silos.values():
            silo.open.clear()
            silo.gradients = None
        if self._round == number:
            return
        try:
            self._load(number)
        except RunError as error:
            raise ProtocolError(
                f"the trunk has no state of round {number}", remedy="give trunk and root the same run directory"
            ) from error

    def _load(self, number: int) -> None:
        state = self._store.load_round(number)
        adapters.load_adapter(self._runner.part, state["adapter"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._version += 1
        self._round = number

    def _run(self, h_TD: torch.Tensor, lengths: list[int]) -> OpenStep:
        input_TD = h_TD.to(self._runner.device, self._runner.dtype).requires_grad_(True)
        with torch.enable_grad():
            output_TD = self._runner.whole(input_TD, lengths)
        return OpenStep(input_TD, output_TD, lengths, self._version)
