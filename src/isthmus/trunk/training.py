"""Training state of the trunk: the silos' open steps, computed together, and their gradients.

Shapes: T tokens of all sequences of a silo, S tokens of all silos computed together, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from isthmus.errors import FrameError, OutOfOrderError, ProtocolError, RunError, UnknownStepError
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.adapter import TrunkAdapter, whole_adapter
from isthmus.trunk.runner import Runner

OPEN_STEPS = 64
"""Forwards a silo may have waiting for their backward."""


@dataclass(frozen=True, eq=False)
class Forward:
    """A training step's way up."""

    silo: str
    step: int
    h_TD: torch.Tensor
    lengths: list[int]


@dataclass(frozen=True, eq=False)
class Backward:
    """Its way back. ``reply`` if the gradient of its input is wanted; ``ascent_pass`` if it alone is."""

    silo: str
    step: int
    gradient_TD: torch.Tensor
    reply: bool
    ascent_pass: bool = False


@dataclass(eq=False)
class Pass:
    """One forward of several silos' steps, with its graph until the first backward through it."""

    inputs: list[torch.Tensor]
    """Of each step, ``[T, D]``, a leaf."""
    leaves: list[list[torch.Tensor]]
    """Of each step, the adapter tensors that it went through."""
    outputs: tuple[torch.Tensor, ...] | None


@dataclass(eq=False)
class OpenStep:
    """A forward whose backward has not come."""

    forward: Forward
    computed: Pass
    place: int
    """Which of the pass's steps it is."""
    version: int
    """Of the adapter that computed it."""

    @property
    def rows(self) -> int:
        return len(self.forward.h_TD)


@dataclass
class SiloState:
    """What one silo has under way."""

    last_step: int = 0
    open: dict[int, OpenStep] = field(default_factory=dict)
    gradients: list[torch.Tensor] | None = None
    """Sum over the backwards since the last optimizer step, one tensor a parameter."""


class Training:
    """Forward and backward for many silos in one pass, and the optimizer step.

    Args:
        store: where the state after each round is kept; round 0 is the untrained adapter.
    """

    def __init__(self, runner: Runner, adapter: TrunkAdapter, store: RoleDirectory) -> None:
        self._runner = runner
        self._adapter = adapter
        self._store = store
        self._silos: dict[str, SiloState] = {}
        self.expected = 1
        """Silos that are in the round under way."""
        self._round: int | None = 0
        """The round whose end this state is; None within a round."""
        if store.rounds():
            self._load(store.last_round())
        else:
            self.save(0)

    def forget(self, silo: str) -> None:
        """Drop what a silo has open: its process is a new one."""
        self._silos.pop(silo, None)

    def check_forward(self, silo: str, step: int, lengths: list[int]) -> None:
        """Raise unless this forward can be computed.

        Raises:
            OutOfOrderError: the step's number is not above the silo's last one.
            ProtocolError: too many steps wait for their backward.
            FrameError: a sequence is longer than the model's context.
        """
        state = self._silos.setdefault(silo, SiloState())
        if step <= state.last_step:
            raise OutOfOrderError(f"step {step} after step {state.last_step}", remedy="number steps upwards")
        if len(state.open) >= OPEN_STEPS:
            raise ProtocolError(f"{OPEN_STEPS} steps without a backward", remedy="evaluate without gradients")
        self._runner.check_context(lengths)

    def forward(self, forwards: list[Forward]) -> list[torch.Tensor]:
        """Run these checked steps' forwards as one pass and keep its graph; returns each step's ``[T, D]``."""
        computed = self._pass(forwards)
        assert computed.outputs is not None
        for place, one in enumerate(forwards):
            state = self._silos.setdefault(one.silo, SiloState())
            state.open[one.step] = OpenStep(one, computed, place, self._adapter.version(one.silo))
            state.last_step = one.step
        return [output_TD.detach() for output_TD in computed.outputs]

    def open_step(self, silo: str, step: int) -> OpenStep:
        """The silo's forward that waits for its backward.

        Raises:
            UnknownStepError: no such step is open.
        """
        opened = self._silos.get(silo, SiloState()).open.get(step)
        if opened is None:
            raise UnknownStepError(
                f"no step {step} is open here", remedy="start the round again: 'isthmus run --resume'"
            )
        return opened

    def partners(self, silo: str, step: int) -> int:
        """How many open steps one backward could serve: those of the same pass, while its graph is there."""
        computed = self.open_step(silo, step).computed
        if computed.outputs is None:
            return 1
        return sum(opened.computed is computed for state in self._silos.values() for opened in state.open.values())

    def backward(self, backwards: list[Backward]) -> list[torch.Tensor | FrameError | None]:
        """Run the backwards of open steps; those of one pass together. Their gradients join each silo's sum, but for
        those of passes ascent_pass.

        Returns:
            For each the gradient of its input if asked for, or the error if the parameters' gradients overflow; that
            step stays open.
        """
        opened = [self._fresh(self.open_step(one.silo, one.step)) for one in backwards]
        results: list[torch.Tensor | FrameError | None] = [None] * len(backwards)
        for computed in {id(step.computed): step.computed for step in opened}.values():
            members = [number for number, step in enumerate(opened) if step.computed is computed]
            found = _gradients([opened[n] for n in members], [backwards[n] for n in members])
            computed.outputs = None  # the graph is spent
            for number, (input_gradient, gradients) in zip(members, found, strict=True):
                results[number] = self._collect(backwards[number], input_gradient, gradients)
        return results

    def waits(self, step: int) -> bool:
        """Whether the silos step together at this optimizer step of a round."""
        return self._adapter.waits(step)

    def step(self, weights: Mapping[str, float], *, together: bool = True) -> None:
        """One optimizer step for these silos; weights are supervised tokens."""
        states = {silo: self._silos.setdefault(silo, SiloState()) for silo in weights}
        held = {silo: (weight, states[silo].gradients) for silo, weight in weights.items()}
        self._adapter.step(held, together=together)
        self._round = None
        for state in states.values():
            state.gradients = None
            state.open.clear()

    def save(self, number: int) -> None:
        """Keep the state as the end of this round."""
        self._store.save_round(number, self._adapter.state())
        self._round = number

    def restore(self, number: int) -> None:
        """Go back to the end of this round, unless the state is just that; what silos had under way is dropped.

        Raises:
            ProtocolError: that round never ended here.
        """
        for state in self._silos.values():
            state.open.clear()
            state.gradients = None
        if self._round == number:
            self._adapter.begin()
            return
        try:
            self._load(number)
        except RunError as error:
            raise ProtocolError(
                f"the trunk has no state of round {number}", remedy="give trunk and root the same run directory"
            ) from error

    def _load(self, number: int) -> None:
        self._adapter.load(self._store.load_round(number))
        self._round = number

    def _pass(self, forwards: list[Forward]) -> Pass:
        inputs = [
            one.h_TD.detach().to(self._runner.device, self._runner.dtype).requires_grad_(True) for one in forwards
        ]
        leaves = [self._adapter.leaves(one.silo) for one in forwards]
        sizes = [len(one.h_TD) for one in forwards]
        stretches = [(size, whole_adapter(self._runner.part, own)) for size, own in zip(sizes, leaves, strict=True)]
        with torch.enable_grad():
            h_SD = torch.cat(inputs) if len(inputs) > 1 else inputs[0]
            lengths = [length for one in forwards for length in one.lengths]
            outputs = torch.split(self._runner.whole(h_SD, lengths, stretches), sizes)
        return Pass(inputs, [list(own.values()) for own in leaves], outputs)

    def _fresh(self, opened: OpenStep) -> OpenStep:
        """The step with a graph of the adapter as it is now: computed again if the others went on without this silo."""
        if opened.computed.outputs is None or opened.version != self._adapter.version(opened.forward.silo):
            opened.computed, opened.place = self._pass([opened.forward]), 0
            opened.version = self._adapter.version(opened.forward.silo)
        return opened

    def _collect(
        self, one: Backward, input_gradient: torch.Tensor | None, gradients: list[torch.Tensor]
    ) -> torch.Tensor | FrameError | None:
        state = self._silos[one.silo]
        if one.ascent_pass:
            del state.open[one.step]
            return input_gradient
        if state.gradients is not None:
            gradients = list(torch._foreach_add(state.gradients, gradients))
        if not torch.stack(torch._foreach_norm(gradients, math.inf)).isfinite().all():
            return FrameError(f"the gradients of step {one.step} overflow", remedy="lower the learning rate")
        del state.open[one.step]
        state.gradients = gradients
        return input_gradient


def _gradients(
    opened: list[OpenStep], backwards: list[Backward]
) -> list[tuple[torch.Tensor | None, list[torch.Tensor]]]:
    """Of steps of one pass, the gradient of each step's input, if asked for, and of its adapter tensors."""
    computed = opened[0].computed
    assert computed.outputs is not None
    wanted, outputs, given = [], [], []
    for step, one in zip(opened, backwards, strict=True):
        outputs.append(computed.outputs[step.place])
        given.append(one.gradient_TD.to(outputs[-1]))
        leaves = [] if one.ascent_pass else computed.leaves[step.place]
        wanted.append([*([computed.inputs[step.place]] if one.reply else []), *leaves])
    found = iter(torch.autograd.grad(outputs, [tensor for tensors in wanted for tensor in tensors], given))
    results: list[tuple[torch.Tensor | None, list[torch.Tensor]]] = []
    for tensors, one in zip(wanted, backwards, strict=True):
        gradients = [next(found) for _ in tensors]
        results.append((gradients[0], gradients[1:]) if one.reply else (None, gradients))
    return results
