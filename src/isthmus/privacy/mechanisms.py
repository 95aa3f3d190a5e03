"""The privacy mechanisms: each clips and noises a tensor before it leaves, and states its charge to the budget.

The units of protection, in increasing order:

- *token*: one vector that crosses. Two releases that differ in one row are indistinguishable up to the stated epsilon.
  A row is not a token of the text: bottom's attention mixes earlier tokens into later rows, so a token affects several
  rows, each of which is charged.
- *sequence*: all rows of one sequence together. Any two sequences of equal length are neighbours.
- *record*: all releases of a record together, by either unit. The accountant composes them (``accountant``) from the
  charges that the mechanisms state for single releases.

Neighbours have equal lengths and equal noise factors. An observer sees both, and neither is protected here. A factor
depends on the text, so the size of the noise shows where sensitive rows are.

Gaussian noise with a clip is added on a grid, since sums in floating point have tell-tale lowest bits (Mironov 2012).
The grid's step is a power of two, about 2⁻¹² of the noise. The vector is clipped in float64 and cut to whole steps
towards zero, so that its norm cannot grow past the clip. Then a discrete Gaussian draw is added, of the stated
deviation: its zero-concentrated privacy is exactly that of the real-valued mechanism (Canonne, Kamath and Steinke
2020), and with thousands of steps to a deviation so is, to many digits, its epsilon at a delta. Charges are therefore
those of the Gaussian mechanism. Every result is a whole number of steps below 2²⁴, exact in float32.

Shapes: T rows of all sequences one after another, S sequences, D width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from isthmus.privacy import events
from isthmus.privacy.analytic import gaussian_noise
from isthmus.privacy.discrete import discrete_gaussian
from isthmus.privacy.events import Charge, Path, Release, merged
from isthmus.privacy.noise import Noise
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import ReleaseSection

FINENESS = 2.0**-12
"""The step of a grid in deviations of its noise, before it is rounded down to a power of two."""
LARGEST_STEPS = 2.0**24
"""Numbers of steps up to this one are exact in float32."""
TAIL = 12.0
"""Deviations that a grid has room for; a draw lies beyond with probability 4e-33, and is then cut off."""
WITHIN = 1 - 2.0**-40
"""Part of the clip that float64 clips to, so that rounding cannot exceed it."""


class Mechanism(Protocol):
    """A privacy mechanism: clips and noises a tensor, and describes the release as an event."""

    @property
    def clip(self) -> float:
        """Largest L2 norm of a unit, in the tensor's units; 0: no clipping."""
        ...

    def clipped(self, h_TD: torch.Tensor, subjects: Subjects) -> torch.Tensor:
        """The tensor clipped to the bound, float32 ``[T, D]``, differentiable. Clipping again changes rounding only."""
        ...

    def secure(self, h_TD: torch.Tensor, subjects: Subjects, noise: Noise) -> torch.Tensor:
        """The clipped and noised tensor, float32 ``[T, D]`` on the device of ``h_TD``, detached.

        Args:
            subjects: the records that the rows belong to; its factors multiply each row's noise.
            noise: the source of random numbers.
        """
        ...

    def simulate(self, h_TD: torch.Tensor, subjects: Subjects, noise: Noise) -> torch.Tensor:
        """Like ``secure``, but with noise that is drawn faster and in floating point; the result must not leave."""
        ...

    def event(self, path: Path, step: int, subjects: Subjects, width: int) -> Release:
        """The event of a release of such a tensor, with size 0.

        Args:
            width: D.
        """
        ...


class _Charging(ABC):
    """Base of the mechanisms: builds a release's event from the charges of its sequences."""

    name: events.MechanismName
    unit: events.Unit
    clip: float

    @property
    @abstractmethod
    def scale(self) -> float:
        """The noise scale that the event states (see ``Release.noise``)."""

    @abstractmethod
    def charge(self, record: str, rows: int, factors_T: torch.Tensor | None) -> Charge:
        """The charge to a record for releasing one sequence.

        Args:
            rows: number of rows of the sequence.
            factors_T: noise factors of the rows, float64, so that a sum's rounding hardly depends on T; None: 1.
        """

    def event(self, path: Path, step: int, subjects: Subjects, width: int) -> Release:
        """The event of a release, with size 0; its charges are merged by record."""
        lengths, factors = subjects.lengths, subjects.factors_T
        pieces: Sequence[torch.Tensor | None] = [None] * len(lengths)
        if factors is not None:
            pieces = torch.split(factors.detach().cpu().double(), list(lengths))
        sequences = zip(subjects.records, lengths, pieces, strict=True)
        charges = merged(self.charge(*sequence) for sequence in sequences)
        return Release(path, step, sum(lengths), width, self.clip, self.scale, 0, self.name, self.unit, charges)


@dataclass(frozen=True)
class Gaussian(_Charging):
    """Clip each row to an L2 norm, then add N(0, noise²) to every coordinate. Zero disables either.

    ``noise`` is a fixed standard deviation, or for ``dp_gaussian`` the one calibrated for unit token. The sensitivity
    of replacing a row is 2·clip, so a row with factor f is charged (2·clip / (f·noise))².
    """

    clip: float
    noise: float
    name: events.MechanismName = "gaussian"
    unit: events.Unit = "token"

    @property
    def scale(self) -> float:
        """The noise scale in the event: the standard deviation."""
        return self.noise

    def clipped(self, h_TD: torch.Tensor, subjects: Subjects) -> torch.Tensor:
        """The tensor with each row clipped, float32 ``[T, D]``, differentiable."""
        return _clip_rows(h_TD.to(torch.float32), self.clip)

    def secure(self, h_TD: torch.Tensor, subjects: Subjects, noise: Noise) -> torch.Tensor:
        """The clipped and noised tensor, float32 ``[T, D]``, detached; whole steps of a grid if clipped and noised."""
        if not (self.clip and self.noise):
            return self.simulate(h_TD, subjects, noise)
        values_TD = _clip_rows(_exact(h_TD), self.clip * WITHIN)
        return _add_steps(values_TD, self.clip, self.noise, subjects, noise).to(h_TD.device)

    def simulate(self, h_TD: torch.Tensor, subjects: Subjects, noise: Noise) -> torch.Tensor:
        """The clipped and noised tensor with noise in floating point, float32 ``[T, D]``, detached."""
        return _add_normal(self.clipped(h_TD.detach(), subjects), self.noise, subjects, noise)

    def charge(self, record: str, rows: int, factors_T: torch.Tensor | None) -> Charge:
        """The charge of the Gaussian mechanism: the sum of its rows' squared sensitivity over noise."""
        if not (self.clip and self.noise):
            return Charge(record, math.inf)
        weight = rows if factors_T is None else float(factors_T.pow(-2).sum())
        return Charge(record, (2 * self.clip / self.noise) ** 2 * weight)


@dataclass(frozen=True)
class SequenceGaussian(_Charging):
    """Clip each sequence's whole matrix to a Frobenius norm, then add N(0, noise²) to every coordinate.

    With factors f, rows are divided by f in the norm: a row with more noise may have a larger norm. After this scaling
    the sensitivity is 2·clip and the noise is uniform, so any sequence is charged (2·clip / noise)².
    """

    clip: float
    noise: float
    name: events.MechanismName = "dp_gaussian"
    unit: events.Unit = "sequence"

    @property
    def scale(self) -> float:
        """The noise scale in the event: the standard deviation."""
        return self.noise

    def clipped(self, h_TD: torch.Tensor, subjects: Subjects) -> torch.Tensor:
        """The tensor with each sequence clipped, float32 ``[T, D]``, differentiable."""
        return self._clip(h_TD.to(torch.float32), subjects, self.clip)

    def _clip(self, h_TD: torch.Tensor, subjects: Subjects, clip: float) -> torch.Tensor:
        norms_T = h_TD.norm(dim=1).double()
        if subjects.factors_T is not None:
            norms_T = norms_T / subjects.factors_T.to(norms_T)
        pieces = torch.split(norms_T, list(subjects.lengths))
        norms_S = torch.stack([piece.norm() for piece in pieces]).clamp_min(1e-30)
        scale_S = (clip / norms_S).clamp_max(1.0).to(h_TD.dtype)
        lengths_S = torch.tensor(subjects.lengths, device=h_TD.device)
        return h_TD * scale_S.repeat_interleave(lengths_S).unsqueeze(1)

    def secure(self, h_TD: torch.Tensor, subjects: Subjects, noise: Noise) -> torch.Tensor:
        """The clipped and noised tensor, float32 ``[T, D]``, detached; whole steps of a grid if noised."""
        if not self.noise:
            return self.simulate(h_TD, subjects, noise)
        values_TD = self._clip(_exact(h_TD), subjects, self.clip * WITHIN)
        return _add_steps(values_TD, self.clip, self.noise, subjects, noise).to(h_TD.device)

    def simulate(self, h_TD: torch.Tensor, subjects: Subjects, noise: Noise) -> torch.Tensor:
        """The clipped and noised tensor with noise in floating point, float32 ``[T, D]``, detached."""
        return _add_normal(self.clipped(h_TD.detach(), subjects), self.noise, subjects, noise)

    def charge(self, record: str, rows: int, factors_T: torch.Tensor | None) -> Charge:
        """The charge of the Gaussian mechanism, the same for any number of rows and any factors."""
        return Charge(record, (2 * self.clip / self.noise) ** 2)


@dataclass(frozen=True)
class Metric(_Charging):
    """Clip each row, then add noise with density proportional to exp(-epsilon·‖z‖): dχ-privacy (Feyisetan et al. 2020).

    The privacy loss between two rows at distance d is at most epsilon·d; with clipping it is at most 2·clip·epsilon
    between any two rows, with delta 0; without clipping it is unbounded. The noise has a uniform direction and a length
    from Gamma(D, 1/epsilon). ``epsilon`` has the inverse of the tensor's units; a row's factor divides it.

    With a clip the sum, computed in float64, is rounded to a grid as fine as those of Gaussian noise: its lowest bits
    tell nothing (Mironov 2012). The bound holds for real numbers: the draws themselves are of finite precision,
    about 2⁻²⁴ of the noise, far below a step.
    """

    clip: float
    epsilon: float
    name: events.MechanismName = "metric"
    unit: events.Unit = "token"

    @property
    def scale(self) -> float:
        """The noise scale in the event: 1/epsilon."""
        return 1 / self.epsilon

    def clipped(self, h_TD: torch.Tensor, subjects: Subjects) -> torch.Tensor:
        """The tensor with each row clipped, float32 ``[T, D]``, differentiable."""
        return _clip_rows(h_TD.to(torch.float32), self.clip)

    def secure(self, h_TD: torch.Tensor, subjects: Subjects, noise: Noise) -> torch.Tensor:
        """The clipped and noised tensor, float32 ``[T, D]``, detached; whole steps of a grid if clipped."""
        if not (self.clip and h_TD.numel()):
            return self.simulate(h_TD, subjects, noise)
        values_TD = _clip_rows(_exact(h_TD), self.clip * WITHIN)
        values_TD += self._drawn(h_TD, subjects, noise).to(values_TD.device)
        factors = [1.0] if subjects.factors_T is None else subjects.factors_T.tolist()
        step = grid_step(self.clip, math.sqrt(h_TD.shape[1] + 1) / self.epsilon, factors)
        return _whole(values_TD / step, step).to(h_TD.device)

    def simulate(self, h_TD: torch.Tensor, subjects: Subjects, noise: Noise) -> torch.Tensor:
        """The clipped and noised tensor in floating point, float32 ``[T, D]``, detached."""
        h_TD = self.clipped(h_TD.detach(), subjects)
        return h_TD + self._drawn(h_TD, subjects, noise).to(h_TD)

    def _drawn(self, h_TD: torch.Tensor, subjects: Subjects, noise: Noise) -> torch.Tensor:
        """The noise, float64 ``[T, D]`` on the CPU."""
        rows, width = h_TD.shape
        direction_TD = noise.normal(rows, width).double()
        length_T = noise.gamma(rows, width).double() / self.epsilon
        if subjects.factors_T is not None:
            length_T *= subjects.factors_T.to(length_T)
        length_T /= direction_TD.norm(dim=1).clamp_min(1e-30)
        return direction_TD * length_T.unsqueeze(1)

    def charge(self, record: str, rows: int, factors_T: torch.Tensor | None) -> Charge:
        """The pure epsilon of all rows; infinite without clipping."""
        if not self.clip:
            return Charge(record, 0.0, math.inf)
        weight = rows if factors_T is None else float(factors_T.reciprocal().sum())
        return Charge(record, 0.0, 2 * self.clip * self.epsilon * weight)


def mechanism_of(section: ReleaseSection) -> Mechanism:
    """The mechanism of a recipe's section.

    The standard deviation of ``dp_gaussian`` is the smallest with which the release of one unit has the section's
    epsilon at its delta, by the analytic Gaussian mechanism (Balle and Wang 2018) with sensitivity 2·clip.
    """
    if section.mechanism == "gaussian":
        return Gaussian(section.clip, section.noise)
    assert section.epsilon is not None  # the recipe's checks require it
    if section.mechanism == "metric":
        return Metric(section.clip, section.epsilon)
    assert section.delta is not None
    noise = 2 * section.clip * gaussian_noise(section.epsilon, section.delta)
    if section.unit == "sequence":
        return SequenceGaussian(section.clip, noise)
    return Gaussian(section.clip, noise, "dp_gaussian")


def _clip_rows(h_TD: torch.Tensor, clip: float) -> torch.Tensor:
    if not clip:
        return h_TD
    norms = h_TD.norm(dim=1, keepdim=True).clamp_min(1e-30)
    clipped: torch.Tensor = h_TD * (clip / norms).clamp_max(1.0)
    return clipped


def _add_normal(h_TD: torch.Tensor, deviation: float, subjects: Subjects, noise: Noise) -> torch.Tensor:
    if not deviation:
        return h_TD
    drawn_TD = noise.normal(*h_TD.shape)
    if subjects.factors_T is not None:
        drawn_TD = drawn_TD * subjects.factors_T.to(drawn_TD).unsqueeze(1)
    return h_TD + deviation * drawn_TD.to(h_TD.device)


def grid_step(clip: float, deviation: float, factors: Sequence[float] = (1.0,)) -> float:
    """The step of the grid on which a release's noise is added: a power of two.

    Args:
        clip: largest L2 norm of a unit.
        deviation: of the noise on rows of factor 1.
        factors: the rows' noise factors.
    """
    largest = clip * max(1.0, *factors) + TAIL * deviation * max(factors)
    fine = 2.0 ** math.floor(math.log2(deviation * min(factors) * FINENESS))
    return max(fine, 2.0 ** math.ceil(math.log2(largest / LARGEST_STEPS)))


def _exact(h_TD: torch.Tensor) -> torch.Tensor:
    """The tensor as float64, on the CPU if its device has no such numbers."""
    return (h_TD.detach().cpu() if h_TD.device.type == "mps" else h_TD.detach()).double()


def _add_steps(
    values_TD: torch.Tensor, clip: float, deviation: float, subjects: Subjects, noise: Noise
) -> torch.Tensor:
    """Cut clipped values, float64, to a grid towards zero and add discrete Gaussian noise on it; float32."""
    if not values_TD.numel():
        return values_TD.to(torch.float32)
    factors_T = torch.ones(len(values_TD), dtype=torch.float64)
    if subjects.factors_T is not None:
        factors_T = subjects.factors_T.detach().cpu().double()
    factors = sorted(set(factors_T.tolist()))
    step = grid_step(clip, deviation, factors)
    steps_TD = (values_TD / step).trunc_()  # a division by a power of two is exact
    drawn_TD = torch.empty(values_TD.shape, dtype=torch.float64)
    for factor in factors:
        rows = (factors_T == factor).nonzero()[:, 0]
        drawn = discrete_gaussian(noise, deviation * factor / step, len(rows) * values_TD.shape[1])
        drawn_TD[rows] = torch.from_numpy(drawn).view(len(rows), -1).double()
    steps_TD += drawn_TD.to(steps_TD.device)
    return _whole(steps_TD, step)


def _whole(steps_TD: torch.Tensor, step: float) -> torch.Tensor:
    """Values given in steps, float64, rounded to whole ones; exact in float32."""
    return steps_TD.round_().clamp_(-LARGEST_STEPS, LARGEST_STEPS).mul_(step).to(torch.float32)
