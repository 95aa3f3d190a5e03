"""The mechanisms that secure a tensor before it leaves, each of which says what it costs.

What they protect, in increasing order:

- *unit token*: one vector that crosses. Two releases that differ in one row are told apart with at most the stated
  epsilon. A row is not a token of text: bottom's attention mixes earlier tokens into later rows, so a token's trace is
  in several rows, each of which is charged.
- *unit sequence*: all rows of one sequence together; any two sequences of one length are neighbours.
- *record*: the same over all releases of a record, by either unit. That is the accountant's affair (``accountant``);
  what each mechanism here hands it is a record's charge for one release.

Neighbours have equal lengths and equal noise factors: both are seen from outside, and neither is protected here. A
factor follows from the text, so where sensitive rows lie is told by the size of their noise.

Shapes: T rows of all sequences one after another, D width; nothing here knows what D means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from isthmus.privacy import events
from isthmus.privacy.analytic import gaussian_noise
from isthmus.privacy.events import Charge, Path, Release, merged
from isthmus.privacy.noise import Noise
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import ReleaseSection


class Mechanism(Protocol):
    """Clips and noises a tensor, and describes the release as an event."""

    @property
    def clip(self) -> float:
        """Largest L2 norm of a unit, in the tensor's units; 0: it is not clipped."""
        ...

    def clipped(self, h_TD: torch.Tensor, subjects: Subjects) -> torch.Tensor:
        """The tensor within the bound, float32 ``[T, D]``, with a gradient. Clipped again, only last bits change."""
        ...

    def secure(self, h_TD: torch.Tensor, subjects: Subjects, noise: Noise) -> torch.Tensor:
        """The secured tensor, float32 ``[T, D]`` on the device of ``h_TD``, detached.

        Args:
            subjects: the records of the rows; its factors multiply each row's noise.
            noise: the source of the draws.
        """
        ...

    def event(self, path: Path, step: int, subjects: Subjects, width: int) -> Release:
        """The release of such a tensor, before or after it happens; without a size yet."""
        ...


class _Charging:
    """Describes releases by what the mechanism charges one sequence's record."""

    name: events.MechanismName
    unit: events.Unit
    clip: float

    @property
    def scale(self) -> float:
        """The noise that the event states (see ``Release.noise``)."""
        raise NotImplementedError

    def charge(self, record: str, rows: int, factors_T: torch.Tensor | None) -> Charge:
        """The charge for one sequence's rows.

        Args:
            factors_T: of the rows' noise, float64 (sums must not depend on the number of rows); None: 1 for all.
        """
        raise NotImplementedError

    def event(self, path: Path, step: int, subjects: Subjects, width: int) -> Release:
        lengths, factors = subjects.lengths, subjects.factors_T
        pieces: Sequence[torch.Tensor | None] = [None] * len(lengths)
        if factors is not None:
            pieces = torch.split(factors.detach().cpu().double(), list(lengths))
        sequences = zip(subjects.records, lengths, pieces, strict=True)
        charges = merged(self.charge(*sequence) for sequence in sequences)
        return Release(path, step, sum(lengths), width, self.clip, self.scale, 0, self.name, self.unit, charges)


@dataclass(frozen=True)
class Gaussian(_Charging):
    """Clip each row to an L2 norm, then add N(0, noise²) to every coordinate. Zero switches either off.

    ``noise`` is the published convention's fixed deviation, or ``dp_gaussian``'s, calibrated for unit token. A row's
    sensitivity is 2·clip (another row in its place), so a row of factor f costs (2·clip / (f·noise))².
    """

    clip: float
    noise: float
    name: events.MechanismName = "gaussian"
    unit: events.Unit = "token"

    @property
    def scale(self) -> float:
        return self.noise

    def clipped(self, h_TD: torch.Tensor, subjects: Subjects) -> torch.Tensor:
        return _clip_rows(h_TD.to(torch.float32), self.clip)

    def secure(self, h_TD: torch.Tensor, subjects: Subjects, noise: Noise) -> torch.Tensor:
        return _add_normal(self.clipped(h_TD.detach(), subjects), self.noise, subjects, noise)

    def charge(self, record: str, rows: int, factors_T: torch.Tensor | None) -> Charge:
        if not (self.clip and self.noise):
            return Charge(record, math.inf)
        weight = rows if factors_T is None else float(factors_T.pow(-2).sum())
        return Charge(record, (2 * self.clip / self.noise) ** 2 * weight)


@dataclass(frozen=True)
class SequenceGaussian(_Charging):
    """Clip each sequence's whole matrix to a Frobenius norm, then add N(0, noise²) to every coordinate.

    With factors f, rows are weighed by 1/f in the norm: rows that get more noise may be that much longer. In these
    weights the sensitivity is 2·clip and the noise even, so a sequence costs (2·clip / noise)² whatever its factors.
    """

    clip: float
    noise: float
    name: events.MechanismName = "dp_gaussian"
    unit: events.Unit = "sequence"

    @property
    def scale(self) -> float:
        return self.noise

    def clipped(self, h_TD: torch.Tensor, subjects: Subjects) -> torch.Tensor:
        h_TD = h_TD.to(torch.float32)
        norms_T = h_TD.norm(dim=1).double()
        if subjects.factors_T is not None:
            norms_T = norms_T / subjects.factors_T.to(norms_T)
        pieces = torch.split(norms_T, list(subjects.lengths))
        norms_S = torch.stack([piece.norm() for piece in pieces]).clamp_min(1e-30)
        scale_S = (self.clip / norms_S).clamp_max(1.0).to(torch.float32)
        lengths_S = torch.tensor(subjects.lengths, device=h_TD.device)
        return h_TD * scale_S.repeat_interleave(lengths_S).unsqueeze(1)

    def secure(self, h_TD: torch.Tensor, subjects: Subjects, noise: Noise) -> torch.Tensor:
        return _add_normal(self.clipped(h_TD.detach(), subjects), self.noise, subjects, noise)

    def charge(self, record: str, rows: int, factors_T: torch.Tensor | None) -> Charge:
        return Charge(record, (2 * self.clip / self.noise) ** 2)


@dataclass(frozen=True)
class Metric(_Charging):
    """Clip each row, then add noise with density proportional to exp(-epsilon·‖z‖): dχ-privacy (Feyisetan et al. 2020).

    Two rows at distance d are told apart with a loss of at most epsilon·d, whatever lies between them; with a clip any
    two rows with at most 2·clip·epsilon, and delta 0. Without a clip that has no bound. The direction is uniform,
    the length of Gamma(D, 1/epsilon). ``epsilon`` is in one over the tensor's units; a row's factor divides it.
    """

    clip: float
    epsilon: float
    name: events.MechanismName = "metric"
    unit: events.Unit = "token"

    @property
    def scale(self) -> float:
        return 1 / self.epsilon

    def clipped(self, h_TD: torch.Tensor, subjects: Subjects) -> torch.Tensor:
        return _clip_rows(h_TD.to(torch.float32), self.clip)

    def secure(self, h_TD: torch.Tensor, subjects: Subjects, noise: Noise) -> torch.Tensor:
        h_TD = self.clipped(h_TD.detach(), subjects)
        rows, width = h_TD.shape
        direction_TD = noise.normal(rows, width)
        length_T = noise.gamma(rows, width) / self.epsilon
        if subjects.factors_T is not None:
            length_T = length_T * subjects.factors_T.to(length_T)
        length_T /= direction_TD.norm(dim=1).clamp_min(1e-30)
        return h_TD + (direction_TD * length_T.unsqueeze(1)).to(h_TD.device)

    def charge(self, record: str, rows: int, factors_T: torch.Tensor | None) -> Charge:
        if not self.clip:
            return Charge(record, 0.0, math.inf)
        weight = rows if factors_T is None else float(factors_T.reciprocal().sum())
        return Charge(record, 0.0, 2 * self.clip * self.epsilon * weight)


def mechanism_of(section: ReleaseSection) -> Mechanism:
    """The mechanism that a recipe's section asks for.

    ``dp_gaussian``'s deviation is the smallest with which one unit's release has the section's epsilon at its delta:
    the analytic Gaussian mechanism (Balle and Wang 2018) for the sensitivity 2·clip of replacing the unit.
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
