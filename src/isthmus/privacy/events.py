"""Privacy events: immutable records of each tensor that left a silo, which an accountant composes into epsilons."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from isthmus.errors import LedgerError

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
    """What was clipped as one vector: each row, or all rows of a sequence. An update is one row."""
    charges: tuple[Charge, ...] = ()
    """One charge for each record."""
    honest: int = 0
    """For a ``summed`` release, the smallest number of honest silos (silos that keep their noise secret) in any sum
    that contains it; ``noise`` and ``charges`` are those of that sum. 0: they are of the silo's own noise alone."""

    def to_dict(self) -> dict[str, Any]:
        """The release as a ledger's line holds it. A charge is a number if purely Gaussian, null if unbounded, and
        otherwise the list ``[gaussian, pure]`` or ``[gaussian, pure, concentrated]``."""
        charges = {charge.record: _charge_to_json(charge) for charge in self.charges}
        return asdict(self) | {"charges": charges}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Release:
        """The release that ``to_dict`` wrote.

        Raises:
            LedgerError: this version does not know such a release, so its cost cannot be composed.
        """
        try:
            charges = tuple(_charge_from_json(record, value) for record, value in values["charges"].items())
            release = cls(**{**values, "charges": charges})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _unknown(values) from error
        known = (release.path, Path), (release.mechanism, MechanismName), (release.unit, Unit)
        if any(value not in get_args(kind) for value, kind in known):
            raise _unknown(values)
        return release


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


def _charge_to_json(charge: Charge) -> Any:
    if not charge.bounded:
        return None
    if charge.concentrated:
        return [charge.gaussian, charge.pure, charge.concentrated]
    return [charge.gaussian, charge.pure] if charge.pure else charge.gaussian


def _charge_from_json(record: str, value: Any) -> Charge:
    if value is None:
        return Charge(record, math.inf)
    if isinstance(value, list) and len(value) < 2:
        raise ValueError(record)
    charge = Charge(record, *map(float, value if isinstance(value, list) else [value]))
    if not charge.bounded or min(charge.gaussian, charge.pure, charge.concentrated) < 0:
        raise ValueError(record)
    return charge


def _unknown(values: dict[str, Any]) -> LedgerError:
    return LedgerError(
        f"the ledger holds an event that cannot be accounted: {str(values)[:200]}",
        remedy="read it with the version of isthmus that wrote it, or start a new run",
    )
