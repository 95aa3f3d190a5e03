"""Training on the trunk: the silos' open steps, batched passes over them, and their gradients.

Shapes: T tokens of all sequences of one silo's step, S tokens of all silos in a pass, D width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from isthmus.errors import FrameError, MismatchError, OutOfOrderError, ProtocolError, RunError, UnknownStepError
from isthmus.model.optimizer_settings import OptimizerSettings
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.adapter import TrunkAdapter, full_adapter
from isthmus.trunk.between import BetweenBlocks
from isthmus.trunk.runner import Runner
from isthmus.trunk.stash import Pass, SavedBytes, bound_stash
from isthmus.updates.between import BlocksChange

OPEN_STEPS = 64
"""Largest number of a silo's forwards without a backward."""
INPUT_BYTES = 4
"""Of each value of a forward's input, at most."""


@dataclass(frozen=True, eq=False)
class ForwardStep:
    """The forward of a silo's training step."""

    silo: str
    step: int
    h_TD: torch.Tensor
    lengths: list[int]
    masks: str | None = None
    """Key of its dropout masks; None: no dropout."""


@dataclass(frozen=True, eq=False)
class BackwardStep:
    """The backward of a silo's training step."""

    silo: str
    step: int
    gradient_TD: torch.Tensor
    reply: bool
    """Whether the silo needs the gradient of its input."""
    ascent_pass: bool = False
    """Whether the adapter's gradients are left out."""
    keep: float = 1.0
    """Factor of the silo's gradients so far, before these are added."""


class InputGradient(NamedTuple):
    """The result of a backward."""

    gradient_TD: torch.Tensor | None
    """Gradient of the input; None if it was not asked for."""
    norm: float
    """L2 norm of the silo's gradients so far; 0 for an ascent pass."""


@dataclass(eq=False)
class OpenStep:
    """A forward whose backward has not come yet."""

    forward: ForwardStep
    computed: Pass
    place: int
    """Index of the step within the pass."""
    version: int
    """Version of the adapter that computed it."""

    @property
    def rows(self) -> int:
        """T."""
        return len(self.forward.h_TD)


@dataclass
class SiloState:
    """The training state of one silo."""

    last_step: int = 0
    open: dict[int, OpenStep] = field(default_factory=dict)
    """Open steps by number."""
    gradients: list[torch.Tensor] | None = None
    """Sum of the gradients, one tensor for each parameter; None: no backward yet. A step of a round with a fixed number
    of steps takes it away; in an open round the silo says what of it stays (``BackwardStep.keep``)."""
    tokens: int = 0
    """Tokens of the backwards in ``gradients`` since the last step."""
    stepped_tokens: int = 0
    """Those of the last step, in an open round, whose gradients stay: a silo may step with them again."""

    def drop_gradients(self) -> None:
        """Forget the gradients, and how many tokens are in them."""
        self.gradients, self.tokens, self.stepped_tokens = None, 0, 0


class TrunkTraining:
    """Forward and backward passes over many silos' steps, and the optimizer step.

    Args:
        store: the directory for the state at the end of each round; round 0 is the untrained adapter.
        seed: the recipe's, of the dropout masks.
        longest: largest L2 norm of a silo's gradients in a step, to which longer ones are scaled; None: no bound.
        stash_bytes: the most bytes of inputs and graphs that wait for their backwards, of all silos.
        silos: number of silos, which share these bytes equally where inputs alone exceed them.
        between: the adapters that the root averages with silos'; None: there are none.
    """

    def __init__(
        self,
        runner: Runner,
        adapter: TrunkAdapter,
        store: RoleDirectory,
        seed: int = 0,
        *,
        longest: float | None = None,
        stash_bytes: int = 2**33,
        silos: int = 1,
        between: BetweenBlocks | None = None,
    ) -> None:
        self._runner = runner
        self._between = between
        self._stash_bytes, self._share = stash_bytes, stash_bytes // silos
        self._adapter = adapter
        self._store = store
        self._silos: dict[str, SiloState] = {}
        self._seed, self._longest = seed, longest
        self._masks: dict[str, tuple[int, int]] = {}
        """By silo: its round, and the forwards with dropout in it."""
        self.expected = 1
        """Number of silos in the running round."""
        self._round: int | None = 0
        """The round at whose end the adapter is; None within a round."""
        self._numbers = itertools.count()
        self.changes = 0
        """Number of times that the adapter has changed."""
        self.completed = 0
        """The last round that was saved or returned to."""
        if store.rounds():
            self._load(store.last_round())
        else:
            self.save(0)

    def require_round(self, peer: str, number: int) -> None:
        """Check that the adapter is still that of the end of this round, of which this silo's adapters are.

        Raises:
            RunError: it has been trained since, or is another round's.
        """
        if self.moved or self.completed != number:
            raise RunError(
                f"{peer} has the adapters of round {number}, the trunk has trained since",
                remedy="wait until the rounds have finished, then open the run or join again",
            )

    def require_saved(self, number: int) -> None:
        """Check that there is a saved state of the end of this round. May be called from any thread.

        Raises:
            ProtocolError: there is none.
        """
        if number not in self._store.rounds():
            raise ProtocolError(
                f"the trunk has no state of round {number}", remedy="start trunk and root from the same run directory"
            )

    @property
    def moved(self) -> bool:
        """Whether the adapter has changed since the end of round ``completed``."""
        return self._round is None

    def forget(self, silo: str) -> None:
        """Drop a silo's open steps and gradients, since a new process of it has connected."""
        self._silos.pop(silo, None)

    def begin(self, silo: str, round: int) -> None:
        """A round of this silo begins, from which its dropout masks follow."""
        self._masks[silo] = (round, 0)

    def next_masks(self, silo: str) -> str:
        """The key of the dropout masks of this silo's next forward."""
        round, drawn = self._masks.get(silo, (0, 0))
        self._masks[silo] = (round, drawn + 1)
        return f"{self._seed}/{silo}/{round}/{drawn}"

    def check_forward(self, silo: str, step: int, lengths: list[int]) -> None:
        """Check that a forward can be computed.

        Raises:
            OutOfOrderError: the step's number is not above that of the silo's last step.
            ProtocolError: ``OPEN_STEPS`` steps wait for their backward, or their inputs and this one have more bytes
                than the silo's share of ``trunk.stash_bytes``.
            FrameError: a sequence is longer than the model's context.
        """
        state = self._silos.setdefault(silo, SiloState())
        if step <= state.last_step:
            raise OutOfOrderError(
                f"received step {step} after step {state.last_step}", remedy="number steps in increasing order"
            )
        if len(state.open) >= OPEN_STEPS:
            raise ProtocolError(f"{OPEN_STEPS} steps wait for their backward", remedy="evaluate under torch.no_grad()")
        held = sum(opened.forward.h_TD.nbytes for opened in state.open.values())
        if held and held + sum(lengths) * self._runner.crossing_width * INPUT_BYTES > self._share:
            raise ProtocolError(
                f"{len(state.open)} steps of {silo} with {held:,} bytes wait for their backward; "
                f"its share of trunk.stash_bytes is {self._share:,}",
                remedy="evaluate under torch.no_grad(), use smaller batches, or raise trunk.stash_bytes",
            )
        self._runner.check_context(lengths)

    def forward(self, forwards: list[ForwardStep]) -> list[torch.Tensor]:
        """Run checked forwards as one pass and keep its graph. Returns the output of each step, ``[T, D]``."""
        computed = self._pass(forwards)
        assert computed.outputs is not None
        for place, one in enumerate(forwards):
            state = self._silos.setdefault(one.silo, SiloState())
            state.open[one.step] = OpenStep(one, computed, place, self._adapter.version(one.silo))
            state.last_step = one.step
        answers = [output_TD.detach() for output_TD in computed.outputs]
        bound_stash(self._passes(), self._stash_bytes - self._input_bytes())
        return answers

    @property
    def stashed_bytes(self) -> int:
        """Bytes of all graphs and inputs that wait for their backwards."""
        return self._input_bytes() + sum(computed.nbytes for computed in self._passes())

    def _input_bytes(self) -> int:
        return sum(one.forward.h_TD.nbytes for state in self._silos.values() for one in state.open.values())

    def _passes(self) -> list[Pass]:
        """The passes of open steps, from the oldest to the newest."""
        found = {one.computed for state in self._silos.values() for one in state.open.values()}
        return sorted(found, key=lambda computed: computed.number)

    def open_step(self, silo: str, step: int) -> OpenStep:
        """The silo's open step with this number.

        Raises:
            UnknownStepError: no such step is open.
        """
        opened = self._silos.get(silo, SiloState()).open.get(step)
        if opened is None:
            raise UnknownStepError(
                f"step {step} is not open on the trunk",
                remedy="do a forward again; if the trunk started again, the round too ('isthmus run --resume')",
            )
        return opened

    def opened(self, silo: str) -> int:
        """Number of the silo's open steps."""
        return len(self._silos.get(silo, SiloState()).open)

    def partners(self, silo: str, step: int) -> int:
        """Number of open steps that one backward pass can compute: those of the same forward pass, while it has its
        graph."""
        computed = self.open_step(silo, step).computed
        if computed.outputs is None:
            return 1
        return sum(opened.computed is computed for state in self._silos.values() for opened in state.open.values())

    def pass_of(self, silo: str, step: int) -> Pass | None:
        """The forward pass of an open step; None if no such step is open."""
        opened = self._silos.get(silo, SiloState()).open.get(step)
        return None if opened is None else opened.computed

    def backward(self, backwards: list[BackwardStep]) -> list[InputGradient | FrameError]:
        """Run the backwards of open steps, those of one forward pass together.

        The adapter's gradients are added to each silo's sum, except for backwards with ``ascent_pass``.

        Returns:
            For each backward its result; an error if the adapter's gradients are not finite, in which case the step
            stays open.
        """
        opened = [self._fresh(self.open_step(one.silo, one.step)) for one in backwards]
        results: list[InputGradient | FrameError] = [InputGradient(None, 0.0)] * len(backwards)
        for computed in {id(step.computed): step.computed for step in opened}.values():
            members = [number for number, step in enumerate(opened) if step.computed is computed]
            try:
                found = _gradients([opened[n] for n in members], [backwards[n] for n in members])
            finally:
                computed.drop()
            for number, (input_gradient, gradients) in zip(members, found, strict=True):
                results[number] = self._collect(backwards[number], input_gradient, gradients)
        return results

    def counted(self, silo: str) -> int:
        """Tokens in this silo's gradients, as many as its next step may weigh: of its backwards since the last step,
        or of that step if none has come since. May be called from any thread."""
        state = self._silos.get(silo, SiloState())
        return state.tokens or state.stepped_tokens

    def steps_together(self, step: int) -> bool:
        """Whether the silos step together at this optimizer step of a round."""
        return self._adapter.steps_together(step)

    def step(self, weights: Mapping[str, float], *, together: bool = True, rate: float | None = None) -> None:
        """Take an optimizer step with these silos' gradients, and forget them.

        Args:
            weights: tokens of each silo's answers.
            together: whether the silos waited for one another at this step.
            rate: the step's learning rate; None: the recipe's ``train.learning_rate``.
        """
        states = {silo: self._silos.setdefault(silo, SiloState()) for silo in weights}
        gradients = {silo: (weight, self._bounded(states[silo].gradients)) for silo, weight in weights.items()}
        self._adapter.step(gradients, together=together, rate=rate)
        if self._between is not None:
            self._between.count(weights)
        self._round = None
        self.changes += 1
        for state in states.values():
            state.drop_gradients()
            state.open.clear()

    def follow(self, contributions: Mapping[str, tuple[float, float]], settings: OptimizerSettings) -> None:
        """Take an optimizer step of an open round. The silos' gradients stay, as those of parameters do.

        Args:
            contributions: weight of each silo, and the factor of its gradients.
            settings: of the silos' own optimizers.
        """
        gradients = {}
        for silo, (weight, scale) in contributions.items():
            own = self._silos.setdefault(silo, SiloState()).gradients if weight else None
            scaled = own if own is None or scale == 1 else list(torch._foreach_mul(own, scale))
            gradients[silo] = (weight, self._bounded(scaled))
        self._adapter.step(gradients, together=True, settings=settings)
        self._round = None
        for state in (self._silos[silo] for silo in contributions if silo in self._silos):
            state.stepped_tokens, state.tokens = state.tokens or state.stepped_tokens, 0

    def save(self, number: int) -> bytes:
        """Save the state as the end of this round. Returns the digest of the saved state."""
        own = {} if self._between is None else {"between": self._between.save(number)}
        self._store.save_round(number, self._adapter.state() | own)
        self._round = self.completed = number
        return self._store.digest(number)

    def trained(self, round: int) -> list[BlocksChange]:
        """What this round changed in blocks that some silos keep.

        Raises:
            RoundLostError: the round was not saved last.
        """
        return [] if self._between is None else self._between.trained(round)

    def settle(self, completed: int, shared: Mapping[str, torch.Tensor]) -> None:
        """Go to the end of this round, with the root's tensors of blocks that some silos keep.

        Raises:
            ProtocolError: there is no saved state of that round.
        """
        if self._between is None:
            return
        self.restore(completed)
        if self._between.settle(shared):
            self._store.save_round(completed, self._adapter.state() | {"between": self._between.saved})
            self.changes += 1

    def digest(self, number: int) -> bytes:
        """The digest of a round's saved state."""
        return self._store.digest(number)

    def last_saved(self) -> int:
        """The last round with a saved state."""
        return self._store.last_round()

    def start_here(self) -> tuple[int, bytes]:
        """Start an open round from the present state. Gradients and open steps, which are of this state, stay.

        Returns:
            The round at whose end the adapter is, and the digest of its state.

        Raises:
            ProtocolError: the adapter is within a round of others.
        """
        if self._round is None:
            raise ProtocolError(
                "the trunk is within a round of another silo",
                remedy="wait until that silo has saved its model, or name all silos in join(..., participants=...)",
            )
        self._adapter.begin()
        return self._round, self._store.digest(self._round)

    def start_from(self, number: int, digest: bytes) -> tuple[int, bytes]:
        """Return to the end of this round, for an open round from there. All gradients and open steps are dropped.

        Raises:
            ProtocolError: there is no saved state of that round.
            MismatchError: it has another digest.
        """
        found = self._store.digest(number) if number in self._store.rounds() else digest
        if digest and found != digest:
            raise MismatchError(
                f"the trunk's round {number} is not the one that was saved with this model",
                remedy="load a model that was trained with this trunk's run directory",
            )
        self.restore(number)
        return number, found

    def restore(self, number: int) -> None:
        """Return to the end of this round and drop all open steps and gradients.

        Raises:
            ProtocolError: there is no saved state of that round.
        """
        for state in self._silos.values():
            state.open.clear()
            state.drop_gradients()
        if self._round == number:
            self._adapter.begin()
            if self._between is not None:
                self._between.begin()
            return
        try:
            self._load(number)
        except RunError as error:
            raise ProtocolError(
                f"the trunk has no state of round {number}", remedy="start trunk and root from the same run directory"
            ) from error

    def _load(self, number: int) -> None:
        state = self._store.load_round(number)
        self._adapter.load(state)
        if self._between is not None:
            self._between.load(state.get("between", {"round": 0, "groups": []}))
        self._round = self.completed = number
        self.changes += 1

    def _pass(self, forwards: list[ForwardStep]) -> Pass:
        inputs = [
            one.h_TD.detach().to(self._runner.device, self._runner.dtype).requires_grad_(True) for one in forwards
        ]
        leaves = [self._adapter.leaves(one.silo) for one in forwards]
        sizes = [len(one.h_TD) for one in forwards]
        segments = [(size, full_adapter(self._runner.part, own)) for size, own in zip(sizes, leaves, strict=True)]
        known = itertools.chain(
            self._runner.part.parameters(), self._runner.part.buffers(), *(own.values() for own in leaves)
        )
        saved = SavedBytes([*known, *inputs])
        with torch.enable_grad(), saved:
            h_SD = torch.cat(inputs) if len(inputs) > 1 else inputs[0]
            lengths = [length for one in forwards for length in one.lengths]
            masks = [one.masks for one in forwards]
            passed = [self._runner.passed(one.silo) for one in forwards for _ in one.lengths]
            outputs = torch.split(self._runner.full_pass(h_SD, lengths, segments, masks, passed), sizes)
        made = Pass(inputs, [list(own.values()) for own in leaves], outputs, number=next(self._numbers))
        made.graph_bytes = saved.nbytes + h_SD.nbytes + self._runner.bytes_elsewhere
        for one, size in zip(forwards, sizes, strict=True):
            made.rows[one.silo] += size
        return made

    def _fresh(self, opened: OpenStep) -> OpenStep:
        """The step with a graph of the current adapter: computed again if the graph is gone or the adapter changed."""
        if opened.computed.outputs is None or opened.version != self._adapter.version(opened.forward.silo):
            opened.computed, opened.place = self._pass([opened.forward]), 0
            opened.version = self._adapter.version(opened.forward.silo)
        return opened

    def _bounded(self, gradients: list[torch.Tensor] | None) -> list[torch.Tensor] | None:
        """A silo's gradients, no longer than may be."""
        if gradients is None or self._longest is None or (norm := _norm(gradients)) <= self._longest:
            return gradients
        return list(torch._foreach_mul(gradients, self._longest / norm))

    def _collect(
        self, one: BackwardStep, input_gradient: torch.Tensor | None, gradients: list[torch.Tensor]
    ) -> InputGradient | FrameError:
        state = self._silos[one.silo]
        if one.ascent_pass:
            del state.open[one.step]
            return InputGradient(input_gradient, 0.0)
        if state.gradients is not None and one.keep:
            kept = state.gradients if one.keep == 1 else torch._foreach_mul(state.gradients, one.keep)
            gradients = list(torch._foreach_add(kept, gradients))
        norm = _norm(gradients)
        if not math.isfinite(norm):
            return FrameError(
                f"the gradients of step {one.step} are not finite",
                remedy="lower the learning rate; in a loop of your own, use bf16 instead of fp16",
            )
        del state.open[one.step]
        if not one.keep:
            state.drop_gradients()
        state.gradients = gradients
        state.tokens += len(one.gradient_TD)
        return InputGradient(input_gradient, norm)


def _norm(gradients: list[torch.Tensor]) -> float:
    """L2 norm of all these numbers."""
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    return float(torch.stack(torch._foreach_norm(gradients, 2, dtype=wide)).norm())


def _gradients(
    opened: list[OpenStep], backwards: list[BackwardStep]
) -> list[tuple[torch.Tensor | None, list[torch.Tensor]]]:
    """The gradients of one pass's steps: for each that of its input (None if not asked for) and of its adapter
    tensors."""
    computed = opened[0].computed
    assert computed.outputs is not None
    wanted, outputs, given = [], [], []
    for step, one in zip(opened, backwards, strict=True):
        outputs.append(computed.outputs[step.place])
        given.append(one.gradient_TD.to(outputs[-1]))
        leaves = [] if one.ascent_pass else computed.leaves[step.place]
        wanted.append([*([computed.inputs[step.place]] if one.reply else []), *leaves])
    inputs = [tensor for tensors in wanted for tensor in tensors]
    # in this thread: autograd has one thread a device, which a silo's backward in the same process may hold
    with torch.autograd.set_multithreading_enabled(False):
        # adapters of blocks that a silo does not pass have the gradient 0
        found = iter(torch.autograd.grad(outputs, inputs, given, allow_unused=True, materialize_grads=True))
    results: list[tuple[torch.Tensor | None, list[torch.Tensor]]] = []
    for tensors, one in zip(wanted, backwards, strict=True):
        gradients = [next(found) for _ in tensors]
        results.append((gradients[0], gradients[1:]) if one.reply else (None, gradients))
    return results
