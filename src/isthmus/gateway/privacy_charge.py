"""What an answer cost: the releases that left the silo for it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from isthmus.privacy.accountant import Accountant
from isthmus.privacy.events import Release

HEADER_PREFIX = "X-Isthmus-"
"""How the names of headers with a charge begin."""


@dataclass(frozen=True)
class PrivacyCharge:
    """The cost of some releases by themselves. Epsilons of several answers about one record compose; they are not
    sums of these."""

    releases: int
    bytes: int
    """Payload."""
    epsilon: float
    """An upper bound, of the record that they cost most; infinite: there is none."""
    delta: float

    @classmethod
    def of(cls, releases: Iterable[Release], delta: float) -> PrivacyCharge:
        """The cost of these releases at this delta."""
        listed = list(releases)
        return cls(len(listed), sum(one.size for one in listed), Accountant(delta, listed).quick_worst(), delta)

    def headers(self) -> dict[str, str]:
        """As headers of an HTTP answer."""
        epsilon = f"{self.epsilon:.6g}" if math.isfinite(self.epsilon) else "unbounded"
        values = {"Releases": self.releases, "Bytes": self.bytes, "Epsilon": epsilon, "Delta": f"{self.delta:g}"}
        return {HEADER_PREFIX + name: str(value) for name, value in values.items()}

    def body(self) -> dict[str, Any]:
        """For JSON; an epsilon without a bound is null."""
        return asdict(self) | {"epsilon": self.epsilon if math.isfinite(self.epsilon) else None}
