"""The recipe's sections on privacy."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from isthmus.recipe.section import Amount, Chance, Positive, Section

KEYS = {
    "gaussian": {"clip", "noise"},
    "dp_gaussian": {"clip", "epsilon", "delta", "unit"},
    "metric": {"clip", "epsilon"},
}
"""What each mechanism can be told."""
NEEDED = {"gaussian": (), "dp_gaussian": ("clip", "epsilon", "delta"), "metric": ("epsilon",)}


class ReleaseSection(Section):
    """How one kind of tensor is secured before it leaves a silo."""

    mechanism: Literal["gaussian", "dp_gaussian", "metric"] = "gaussian"
    """Noise of a fixed deviation; noise calibrated from epsilon and delta; or noise that hides near vectors among one
    another (dχ-privacy)."""
    clip: Amount = 0.0
    """Largest L2 norm of one row (one token; for an update, the whole update), with unit "sequence" of all rows of a
    sequence together. 0: not clipped, and no finite epsilon."""
    noise: Amount = 0.0
    """gaussian: standard deviation of the noise on every coordinate, in the tensor's own units."""
    epsilon: Positive | None = None
    """dp_gaussian: of one unit's release. metric: for each unit of L2 distance between two vectors."""
    delta: Chance | None = None
    """dp_gaussian: of one unit's release."""
    unit: Literal["token", "sequence"] = "token"
    """dp_gaussian: whether one crossing vector is protected, or all vectors of a sequence together."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        told = {name for name in ReleaseSection.model_fields if getattr(self, name) != _default(name)} - {"mechanism"}
        for name in sorted(told - KEYS[self.mechanism]):
            raise ValueError(f"{name}: the mechanism {self.mechanism!r} does not take it; leave {name} out")
        for name in NEEDED[self.mechanism]:
            if not getattr(self, name):
                raise ValueError(f"{name}: the mechanism {self.mechanism!r} needs it; add {name}")
        return self

    @property
    def bounded(self) -> bool:
        """Whether a release has a finite epsilon."""
        return self.clip > 0 and (self.noise > 0 or self.epsilon is not None)


class PrivacySection(Section):
    """How much may leave about a record, and about a silo, in all."""

    delta: Chance = 1e-5
    """At which every epsilon is stated; well below one over the number of records."""
    record_epsilon: Positive | None = None
    """Largest epsilon of one record's hidden states and gradients, all composed. A record that is spent takes no
    further part in training; a prompt that is spent is refused. Left out: no limit."""
    silo_epsilon: Positive | None = None
    """Largest epsilon of everything that leaves a silo, updates too, composed as if it were about one record."""


def _default(name: str) -> object:
    return ReleaseSection.model_fields[name].default
