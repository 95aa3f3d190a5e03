"""The boundary: the silo's only exit for tensors. It checks budgets, clips, adds noise, encodes, records the release.

Shapes: T tokens, D width, P parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

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

WHOLE = Subjects((ALL,), (1,))
"""The records of an update: one row, about all of them."""


class Boundary:
    """Everything that leaves a silo leaves through one of these methods.

    Args:
        section: mechanism and codec of each path.
        ledger: records each release before it leaves; in memory by default.
        budget: limits what may still leave; no limit by default.
        records: finds the record that a sequence belongs to; by default without a silo's data.
        released: the examples of a silo that releases each of them once; None: hidden states leave at every forward.
        generator: in place of the secret noise, one whose draws can be repeated.
    """

    def __init__(
        self,
        section: BoundarySection,
        ledger: Ledger | None = None,
        *,
        budget: Budget | None = None,
        records: Records | None = None,
        released: Released | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._codec = section.codec
        self._gradients = section.gradients
        self._mechanisms: dict[Path, Mechanism] = {
            "forward": mechanism_of(section.forward),
            "gradient": mechanism_of(section.gradient),
            "update": mechanism_of(section.update),
        }
        self._update_event = self._mechanisms["update"].event("update", 0, WHOLE, 0)
        """The release of any update, but for its step, width and size."""
        self.ledger = ledger or MemoryLedger()
        self.budget = budget or Budget()
        self.records = records or Records()
        self.released = released
        self._noise: Noise = SecretNoise() if generator is None else SeededNoise(generator)
        self._rounding = generator or secret_generator()
        self.clips = section.forward.clip > 0
        """Whether hidden states are clipped before they leave."""
        self.limited = self.budget.limited or self.records.limited
        """Whether anything limits what a record or the silo is charged."""
        self.released_bytes: Counter[str] = Counter()
        """Payload bytes that left, by path."""
        self.admitted_bytes = 0

    def release(self, h_TD: torch.Tensor, path: Path, step: int, subjects: Subjects) -> pb.Matrix:
        """Secure ``h_TD`` and encode it; from here on it may leave, as often as the wire needs.

        Args:
            subjects: the records of its rows.

        Raises:
            BudgetExhausted: a record's budget, or the silo's, does not allow it. Nothing is charged, nothing leaves.
        """
        event, secured = self._secure(h_TD, path, step, subjects)
        if path == "gradient":
            matrix = codec.encode(secured, self._codec.gradient_up, self._rounding)
        else:
            matrix = codec.encode(secured, self._codec.forward_up)
        self._note(event, len(matrix.data))
        return matrix

    def release_example(self, number: int, h_LW: torch.Tensor, step: int, subjects: Subjects) -> pb.Matrix:
        """Release an example's hidden states for good: the bytes stay on the silo's disk, too, for ``again``.

        Raises:
            BudgetExhausted: as in ``release``.
            DiskFullError: the disk has no room for the ledger's line or the bytes. Nothing leaves.
        """
        assert self.released is not None
        matrix = self.release(h_LW, "forward", step, subjects)
        self.released.write(number, matrix)
        return matrix

    def again(self, numbers: Iterable[int]) -> Iterator[pb.Keep]:
        """The frames of examples as they were when they were released (see ``Released.again``)."""
        assert self.released is not None
        return self.released.again(numbers)

    def noise_in(self, matrix: pb.Matrix, h_TW: torch.Tensor, subjects: Subjects) -> torch.Tensor:
        """The noise in a release of ``h_TW``: what mechanism and codec added after clipping, ``[T, W]``."""
        rows, width = h_TW.shape
        arrived = codec.decode(matrix, rows=rows, width=width, codec=self._codec.forward_up, device=h_TW.device)
        return arrived.to(h_TW) - self.clipped(h_TW.detach(), "forward", subjects)

    def clipped(self, h_TD: torch.Tensor, path: Path, subjects: Subjects) -> torch.Tensor:
        """The tensor as it will be clipped, with a gradient, so that what is learned knows of the clipping."""
        return self._mechanisms[path].clipped(h_TD, subjects).to(h_TD.dtype)

    def rehearsed(self, h_TD: torch.Tensor, path: Path, subjects: Subjects) -> torch.Tensor:
        """What a release would let out, drawn for the silo's own eyes: it must not leave, so nothing is charged."""
        return self._mechanisms[path].secure(h_TD, subjects, self._noise)

    def release_update(self, row_P: torch.Tensor, step: int, encode: Callable[[torch.Tensor], pb.Update]) -> pb.Update:
        """Secure an adapter update, which is one row, and encode it.

        Args:
            encode: makes the frame that leaves of the secured row, fp32, P, on the CPU.

        Raises:
            BudgetExhausted: as in ``release``.
        """
        event = replace(self._update_event, step=step, width=len(row_P))
        if self.budget.limited:
            self.budget.require(event, WHOLE)
        update = encode(self._mechanisms["update"].secure(row_P.unsqueeze(0), WHOLE, self._noise)[0].cpu())
        size = len(update.masked) + len(update.compressed) + sum(len(tensor.data) for tensor in update.tensors)
        self._note(event, size)
        return update

    def release_summed(self, events: Sequence[Release], encode: Callable[[Noise], pb.Update]) -> pb.Update:
        """Release an update whose noise and clip are those of a sum.

        Args:
            events: the releases in its frame, the update first.
            encode: makes the frame that leaves, with noise from the given draws.

        Raises:
            BudgetExhausted: as in ``release``.
        """
        first, *others = events
        charges = merged(charge for event in events for charge in event.charges)
        self.budget.require(replace(first, charges=charges), WHOLE)
        update = encode(self._noise)
        self._note(first, len(update.masked))
        for event in others:  # in the same frame
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
            forwards: times that the hidden states leave. An example that is released once leaves once, or never again.
            gradients: times that loss gradients leave, if the recipe lets any leave.
        """
        if not self.limited:
            return [True] * len(rows)
        subjects, released = self.records.subjects(rows, lengths), self.released
        costs = []
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            one, times = subjects.of(place), forwards
            if released is not None and forwards:
                times = 0 if released.number(row, length) in released else 1
            charges: list[Charge] = []
            for path, count in (("forward", times), ("gradient", gradients if self._gradients else 0)):
                if count:
                    charges += self._mechanisms[path].event(path, 0, one, 0).charges * count  # type: ignore[index, arg-type]
            costs.append(charges)
        return self.budget.affordable(costs, subjects)

    def update_affordable(self, charge: Charge | None = None) -> bool:
        """Whether the silo's privacy budget allows another update to leave.

        Args:
            charge: the update's; by default that of the boundary's own clip and noise.
        """
        charges = (charge,) if charge else self._update_event.charges
        return all(self.budget.affordable([charges], WHOLE))

    def admit(self, matrix: pb.Matrix, path: Path, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        """A tensor that came in on this path, on the device and in the dtype of ``like``.

        Args:
            shape: the rows and the width that it must have.

        Raises:
            FrameError: it is anything else.
        """
        rows, width = shape
        self.admitted_bytes += len(matrix.data)
        name = self._codec.gradient_down if path == "gradient" else self._codec.forward_down
        return codec.decode(matrix, rows=rows, width=width, codec=name, device=like.device).to(like)

    def _secure(self, h_TD: torch.Tensor, path: Path, step: int, subjects: Subjects) -> tuple[Release, torch.Tensor]:
        mechanism = self._mechanisms[path]
        event = mechanism.event(path, step, subjects, h_TD.shape[1])
        if self.budget.limited or subjects.budgets is not None:
            self.budget.require(event, subjects)
        return event, mechanism.secure(h_TD, subjects, self._noise)

    def _note(self, event: Release, size: int) -> None:
        event = replace(event, size=size)
        self.ledger.record(event)
        self.budget.accountant.note(event)
        self.released_bytes[event.path] += size
