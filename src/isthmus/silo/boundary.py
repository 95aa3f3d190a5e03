"""The boundary: the silo's only exit for tensors. It checks budgets, clips, adds noise, encodes, and records releases.

Shapes: T tokens, D width, W width that crosses, P parameters.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from isthmus.model.answers import KeptAnswers, decode_answers
from isthmus.privacy.budget import Budget
from isthmus.privacy.events import ALL, Charge, Path, Release, merged
from isthmus.privacy.ledger import Ledger, MemoryLedger
from isthmus.privacy.mechanisms import Mechanism, mechanism_of
from isthmus.privacy.noise import Noise, SecretNoise, SeededNoise, secret_generator
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import BoundarySection
from isthmus.silo.records import Records
from isthmus.silo.released import Released
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb

UPDATE_SUBJECTS = Subjects((ALL,), (1,))
"""The subjects of an update: one row that belongs to all records."""


class Boundary:
    """Releases a silo's tensors. Every tensor that leaves the silo passes one of its methods.

    Args:
        section: mechanism and codec of each path.
        ledger: records each release before it leaves; in memory by default.
        budget: the privacy budgets that releases must fit; unlimited by default.
        records: maps sequences to the records they belong to; by default it has no rows.
        released: the stored releases if each example is released once; None: hidden states leave at every forward.
        answers: the last answer about each example, if later ones cross as differences; None: they cross whole.
        generator: seeded source of noise for reproducible tests; None: noise from a secret key.
    """

    def __init__(
        self,
        section: BoundarySection,
        ledger: Ledger | None = None,
        *,
        budget: Budget | None = None,
        records: Records | None = None,
        released: Released | None = None,
        answers: KeptAnswers | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._codec = section.codec
        self._gradients = section.gradients
        self._mechanisms: dict[Path, Mechanism] = {
            "forward": mechanism_of(section.forward),
            "gradient": mechanism_of(section.gradient),
            "update": mechanism_of(section.update),
        }
        self._update_event = self._mechanisms["update"].event("update", 0, UPDATE_SUBJECTS, 0)
        """The release of an update, with step, width and size to be filled in."""
        self.ledger = ledger or MemoryLedger()
        self.budget = budget or Budget()
        self.records = records or Records()
        self.released = released
        self._answers = answers
        self._noise: Noise = SecretNoise() if generator is None else SeededNoise(generator)
        self._rounding = generator or secret_generator()
        self._one_at_a_time = threading.Lock()
        """Held from the budget's check to the ledger's line: generations of several threads share both."""
        self.clips = section.forward.clip > 0
        """Whether hidden states are clipped before they leave."""
        crossing: tuple[Path, ...] = ("forward", "gradient")
        self.noised = any(self._mechanisms[path].event(path, 0, UPDATE_SUBJECTS, 0).noise for path in crossing)
        """Whether noise is added to what a training step sends."""
        self.limited = self.budget.limited or self.records.limited
        """Whether a record or the silo has a privacy budget."""
        self._evaluating = False
        self.released_bytes: Counter[str] = Counter()
        """Payload bytes released so far, by path."""
        self.received_bytes = 0
        """Payload bytes decoded so far."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the ``with`` block releases are noted as an evaluation's. Not for several threads."""
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False

    def release(self, h_TD: torch.Tensor, path: Path, step: int, subjects: Subjects) -> pb.Matrix:
        """Clip, noise and encode ``h_TD``. The result may be sent any number of times.

        Args:
            path: ``"forward"`` or ``"gradient"``.
            step: the step's number, for the ledger.
            subjects: the records that the rows belong to.

        Raises:
            BudgetExhausted: a record's privacy budget, or the silo's, does not allow it. Nothing is charged or leaves.
        """
        return self.noted_release(h_TD, path, step, subjects)[0]

    def noted_release(self, h_TD: torch.Tensor, path: Path, step: int, subjects: Subjects) -> tuple[pb.Matrix, Release]:
        """``release``, with its event as the ledger has it.

        Raises:
            BudgetExhausted: as ``release``.
        """
        with self._one_at_a_time:
            event, secured = self._secure(h_TD, path, step, subjects)
            if path == "gradient":
                matrix = codec.encode(secured, self._codec.gradient_up, self._rounding)
            else:
                matrix = codec.encode(secured, self._codec.forward_up)
            return matrix, self._note(event, len(matrix.data))

    def release_example(self, number: int, h_LW: torch.Tensor, step: int, subjects: Subjects) -> pb.Matrix:
        """Release an example's hidden states and store the bytes on disk for ``released_frames``.

        Args:
            number: the example's identifier.

        Raises:
            BudgetExhausted: a record's privacy budget, or the silo's, does not allow it. Nothing is charged or leaves.
            DiskFullError: the disk has no room for the ledger's line or the bytes. Nothing leaves.
        """
        assert self.released is not None
        matrix = self.release(h_LW, "forward", step, subjects)
        self.released.write(number, matrix)
        return matrix

    def released_frames(self, numbers: Iterable[int]) -> Iterator[pb.Keep]:
        """The frames of released examples, with the bytes that were released (see ``Released.frames``).

        Raises:
            RunError: a stored release is missing from the disk.
        """
        assert self.released is not None
        return self.released.frames(numbers)

    def added_noise(self, matrix: pb.Matrix, h_TW: torch.Tensor, subjects: Subjects) -> torch.Tensor:
        """Noise and rounding error in ``matrix``, a release of ``h_TW``: decoded minus clipped values, ``[T, W]``."""
        rows, width = h_TW.shape
        decoded = codec.decode(matrix, rows=rows, width=width, codec=self._codec.forward_up, device=h_TW.device)
        return decoded.to(h_TW) - self.clipped(h_TW.detach(), "forward", subjects)

    def clipped(self, h_TW: torch.Tensor, path: Path, subjects: Subjects) -> torch.Tensor:
        """The tensor clipped as a release on this path would clip it, in its own dtype; differentiable."""
        return self._mechanisms[path].clipped(h_TW, subjects).to(h_TW.dtype)

    def simulated(self, h_TD: torch.Tensor, path: Path, subjects: Subjects) -> torch.Tensor:
        """The tensor clipped and noised as in a release, float32. It is not charged, so it must stay in the silo."""
        return self._mechanisms[path].simulate(h_TD, subjects, self._noise)

    def release_update(
        self, row_P: torch.Tensor, step: int, encode: Callable[[torch.Tensor], pb.Update], *, summed: int = 0
    ) -> pb.Update:
        """Clip, noise and encode an adapter update.

        Args:
            row_P: the update as one row.
            encode: makes the frame from the noised row, float32 ``[P]`` on the CPU.
            summed: as in ``Release``.

        Raises:
            BudgetExhausted: the silo's privacy budget does not allow it. Nothing is charged or leaves.
        """
        event = replace(self._update_event, step=step, width=len(row_P), summed=summed)
        with self._one_at_a_time:
            if self.budget.limited:
                self.budget.require(event, UPDATE_SUBJECTS)
            row_1P = self._mechanisms["update"].secure(row_P.unsqueeze(0), UPDATE_SUBJECTS, self._noise)
            update = encode(row_1P[0].cpu())
            size = len(update.masked) + len(update.compressed) + sum(len(tensor.data) for tensor in update.tensors)
            self._note(event, size)
            return update

    def release_summed(self, events: Sequence[Release], encode: Callable[[Noise], pb.Update]) -> pb.Update:
        """Release an update whose noise is a share of the noise on the sum over silos.

        Args:
            events: the releases that its frame contains, the update first.
            encode: clips, noises and encodes the update, with noise from the given source.

        Raises:
            BudgetExhausted: the silo's privacy budget does not allow it. Nothing is charged or leaves.
        """
        first, *others = events
        charges = merged(charge for event in events for charge in event.charges)
        with self._one_at_a_time:
            self.budget.require(replace(first, charges=charges), UPDATE_SUBJECTS)
            update = encode(self._noise)
            self._note(first, len(update.masked))
            for event in others:  # their bytes are in the same frame
                self._note(event, 0)
            return update

    def affordable(
        self,
        rows: list[list[int]],
        lengths: list[int],
        *,
        forwards: int = 1,
        gradients: int = 1,
    ) -> list[bool]:
        """For each sequence of token ids, whether the privacy budgets allow that its last ``lengths`` tokens cross.

        Args:
            rows: token ids of each whole sequence.
            forwards: number of times that hidden states leave. With release once it counts as one, or as none if the
                example was released before.
            gradients: number of times that loss gradients leave; ignored if the recipe lets none leave.
        """
        if not self.limited:
            return [True] * len(rows)
        return self.budget.affordable(*self.costs(rows, lengths, forwards=forwards, gradients=gradients))

    def costs(
        self, rows: list[list[int]], lengths: list[int], *, forwards: int = 1, gradients: int = 1
    ) -> tuple[list[list[Charge]], Subjects]:
        """The charges of each sequence for these releases, and the records that the sequences belong to.

        Args:
            rows, lengths, forwards, gradients: as in ``affordable``.
        """
        subjects, released = self.records.subjects(rows, lengths), self.released
        costs = []
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            one, times = subjects.of(index), forwards
            if released is not None and forwards:
                times = 0 if released.number(row, length) in released else 1
            charges: list[Charge] = []
            for path, count in (("forward", times), ("gradient", gradients if self._gradients else 0)):
                if count:
                    charges += self._mechanisms[path].event(path, 0, one, 0).charges * count  # type: ignore[index, arg-type]
            costs.append(charges)
        return costs, subjects

    def update_affordable(self, charge: Charge | None = None) -> bool:
        """Whether the silo's privacy budget allows another update to leave.

        Args:
            charge: the update's charge; None: that of the boundary's own clip and noise.
        """
        charges = (charge,) if charge else self._update_event.charges
        return all(self.budget.affordable([charges], UPDATE_SUBJECTS))

    def decode_reply(self, matrix: pb.Matrix, path: Path, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        """Decode a matrix received on this path, to the device and dtype of ``like``.

        Args:
            shape: the expected rows and width.

        Raises:
            FrameError: shape, codec or size differ from what is expected, or a value is not finite.
        """
        rows, width = shape
        self.received_bytes += len(matrix.data)
        name = self._codec.gradient_down if path == "gradient" else self._codec.forward_down
        return codec.decode(matrix, rows=rows, width=width, codec=name, device=like.device).to(like)

    def earlier_answers(self, numbers: Sequence[int], lengths: Sequence[int]) -> list[torch.Tensor | None] | None:
        """The last answer about each of these examples, ``[L, D]``; None if answers cross whole."""
        if self._answers is None:
            return None
        return [self._answers.read(number, length) for number, length in zip(numbers, lengths, strict=True)]

    def decode_answers(
        self, answer: pb.Hidden, request: pb.Forward, bases: Sequence[torch.Tensor | None], width: int
    ) -> torch.Tensor:
        """Decode the answer to a forward that named the answers before, fp32 ``[T, width]``, and keep it.

        Args:
            bases: what ``earlier_answers`` gave for the request.

        Raises:
            FrameError: shape, codec or size differ from what is expected, or a value is not finite.
            DiskFullError: the disk is full.
        """
        assert self._answers is not None
        self.received_bytes += len(answer.hidden.data) + len(answer.changes.data)
        rows = decode_answers(answer, list(request.lengths), bases, self._codec.forward_down, width)
        for number, row_LD in zip(request.examples, rows, strict=True):
            self._answers.write(number, row_LD)
        return torch.cat(rows)

    def _secure(self, h_TD: torch.Tensor, path: Path, step: int, subjects: Subjects) -> tuple[Release, torch.Tensor]:
        mechanism = self._mechanisms[path]
        event = mechanism.event(path, step, subjects, h_TD.shape[1])
        if self.budget.limited or subjects.budgets is not None:
            self.budget.require(event, subjects)
        return event, mechanism.secure(h_TD, subjects, self._noise)

    def _note(self, event: Release, size: int) -> Release:
        event = replace(event, size=size, evaluation=self._evaluating)
        self.ledger.record(event)
        self.budget.note(event)
        self.released_bytes[event.path] += size
        return event
