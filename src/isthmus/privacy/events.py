"""Privacy events: immutable records of each tensor that left a silo, which an accountant composes into epsilons."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Path = Literal["forward", "gradient", "update", "norm"]
"""The kind of tensor released: hidden states, a loss gradient with respect to them, an adapter update, or the report
whether an update was within its clip."""
MechanismName = Literal["gaussian", "dp_gaussian", "metric", "summed"]
Unit = Literal["token", "sequence"]
ALL = "*"
"""Stands for a record's name in the charge of an adapter update, which concerns all of a silo's records."""


@dataclass(frozen=True, slots=True)
class Charge:
    """The privacy cost of one release for one record.

    Neighbours are two records of equal length whose rows have equal noise factors.
    """

    record: str
    gaussian: float = 0.0
    """Cost of Gaussian noise: the squared ratio of sensitivity to standard deviation, summed over the record's rows.
    The record's privacy loss is that of one Gaussian mechanism with sensitivity 1 and variance 1/``gaussian``, and
    charges compose by addition (Dong, Roth and Su 2022: μ²)."""
    pure: float = 0.0
    """Cost of metric noise: an epsilon with delta 0."""
    concentrated: float = 0.0
    """Cost of discrete Gaussian noise: ρ of zero-concentrated privacy (Bun and Steinke 2016). Composes by addition."""

    @property
    def bounded(self) -> bool:
        """Whether all three costs are finite."""
        return all(map(math.isfinite, (self.gaussian, self.pure, self.concentrated)))


@dataclass(frozen=True, slots=True)
class Release:
    """One tensor that left a silo."""

    path: Path
    step: int
    rows: int
    width: int
    clip: float
    """Largest L2 norm of a unit, in the tensor's units; 0: not clipped, so that no epsilon is finite."""
    noise: float
    """Scale of the noise on rows of factor 1, in the tensor's units. Gaussian: the standard deviation of each
    coordinate. Metric: the scale of the noise's length, so that a coordinate's variance is (width + 1)·noise²."""
    size: int
    """Payload in bytes."""
    mechanism: MechanismName = "gaussian"
    unit: Unit = "token"
    """The unit that was clipped as one vector: each row, or all rows of a sequence. An update is one row."""
    charges: tuple[Charge, ...] = ()
    """One charge for each record."""
    honest: int = 0
    """For a ``summed`` release, the smallest number of honest silos (silos that keep their noise secret) in any sum
    that contains it; ``noise`` and ``charges`` are those of that sum. 0: they are of the silo's own noise alone."""
    summed: int = 0
    """For an update under masks, the fewest silos in any sum that contains it: for fewer the silo reveals nothing by
    which it could be read. 0: who receives the release can read it alone."""
    evaluation: bool = False
    """Whether it left to measure the model, not to train or use it. It is charged as any other."""


def merged(charges: Iterable[Charge]) -> tuple[Charge, ...]:
    """One charge for each record, the sum of its charges, ordered by each record's first charge."""
    found: dict[str, Charge] = {}
    for one in charges:
        before = found.get(one.record, Charge(one.record))
        found[one.record] = Charge(
            one.record,
            before.gaussian + one.gaussian,
            before.pure + one.pure,
            before.concentrated + one.concentrated,
        )
    return tuple(found.values())
