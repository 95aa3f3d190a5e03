"""What left a silo, as immutable events: a mechanism describes itself, an accountant may then compose it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from isthmus.errors import LedgerError

Path = Literal["forward", "gradient", "update", "norm"]
"""What kind of tensor left: hidden states, the loss gradient on its way down, an adapter update, or whether an update
was no longer than its clip."""
Mechanism = Literal["gaussian", "dp_gaussian", "metric", "summed"]
Unit = Literal["token", "sequence"]
ALL = "*"
"""In place of a record's name: an adapter update, which is about all of a silo's records at once."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What one record is charged for one release.

    Neighbours are two records of one length whose rows have the same noise factors.
    """

    record: str
    gaussian: float = 0.0
    """Of Gaussian noise: the squared ratio of sensitivity and deviation, summed over the record's rows. That is all
    that composition needs: the record's privacy loss is that of one Gaussian mechanism with sensitivity 1 and
    variance 1/``gaussian`` (Dong, Roth and Su 2022: μ² adds up)."""
    pure: float = 0.0
    """Of metric noise: an epsilon with delta 0."""
    concentrated: float = 0.0
    """Of noise in whole numbers: ρ of zero-concentrated privacy (Bun and Steinke 2016), which adds up."""

    @property
    def bounded(self) -> bool:
        return all(map(math.isfinite, (self.gaussian, self.pure, self.concentrated)))


@dataclass(frozen=True, slots=True)
class Release:
    """One tensor that left a silo, once."""

    path: Path
    step: int
    rows: int
    width: int
    clip: float
    """Largest L2 norm of a unit, in the tensor's units; 0: not clipped, and no finite epsilon follows."""
    noise: float
    """In the tensor's units, for rows of factor 1: the Gaussian's standard deviation on each coordinate; for metric
    noise the scale of its length, so that a coordinate's variance is (width + 1)·noise²."""
    size: int
    """Payload in bytes."""
    mechanism: Mechanism = "gaussian"
    unit: Unit = "token"
    """What was clipped as a whole: each row, or each sequence's rows together. An update is one row."""
    charges: tuple[Charge, ...] = ()
    """One a record."""
    honest: int = 0
    """Of a summed release: it is seen in no sum with the noise of fewer silos, and these are supposed to be honest.
    Noise and charge are that sum's. 0: the silo's own noise alone is meant."""

    def to_dict(self) -> dict[str, Any]:
        """As one line of a ledger: a record's charge is a number, a list with a pure or concentrated part, or null if
        unbounded."""
        charges = {charge.record: _told(charge) for charge in self.charges}
        return asdict(self) | {"charges": charges}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Release:
        """The release that ``to_dict`` described.

        Raises:
            LedgerError: it is no release that this version knows: composing the rest would be too little.
        """
        try:
            charges = tuple(_heard(record, told) for record, told in values["charges"].items())
            release = cls(**{**values, "charges": charges})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _unknown(values) from error
        known = (release.path, Path), (release.mechanism, Mechanism), (release.unit, Unit)
        if any(value not in get_args(kind) for value, kind in known):
            raise _unknown(values)
        return release


def merged(charges: Iterable[Charge]) -> tuple[Charge, ...]:
    """One charge a record, in the order in which records first come."""
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


def _told(charge: Charge) -> Any:
    if not charge.bounded:
        return None
    if charge.concentrated:
        return [charge.gaussian, charge.pure, charge.concentrated]
    return [charge.gaussian, charge.pure] if charge.pure else charge.gaussian


def _heard(record: str, told: Any) -> Charge:
    if told is None:
        return Charge(record, math.inf)
    if isinstance(told, list) and len(told) < 2:
        raise ValueError(record)
    charge = Charge(record, *map(float, told if isinstance(told, list) else [told]))
    if not charge.bounded or min(charge.gaussian, charge.pure, charge.concentrated) < 0:
        raise ValueError(record)
    return charge


def _unknown(values: dict[str, Any]) -> LedgerError:
    return LedgerError(
        f"the ledger holds an event that cannot be accounted: {str(values)[:200]}",
        remedy="use the version of isthmus that wrote it, or start a new run",
    )
