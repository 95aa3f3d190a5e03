"""``[federation.robust]``: aggregation that withstands malicious contributions.

Letters: N contributions, f of them malicious.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from isthmus.recipe.section import Name, Section

RuleName = Literal[
    "mean",
    "norm-bound",
    "median",
    "trimmed-mean",
    "krum",
    "multi-krum",
    "bulyan",
    "geometric-median",
    "centered-clipping",
    "fltrust",
]
MAJORITY = (2, 1)
NEEDS: dict[RuleName, tuple[int, int]] = {
    "mean": (0, 1),
    "norm-bound": MAJORITY,
    "median": MAJORITY,
    "trimmed-mean": MAJORITY,
    "krum": (2, 3),
    "multi-krum": (2, 3),
    "bulyan": (4, 3),
    "geometric-median": MAJORITY,
    "centered-clipping": MAJORITY,
    "fltrust": (0, 1),
}
"""For each rule a and b of N ≥ a·f + b. The papers are named where the rules are, in ``federation/strategies``."""


class RobustSection(Section):
    """Aggregation that withstands malicious silos or, with edges, malicious cohorts;
    ``robust = "median"`` sets rule."""

    main = "rule"

    rule: RuleName = "mean"
    """How the root makes one change of many. Every rule but "mean" counts each contribution alike, whatever weight it
    claims. With masks, a rule needs edges: it compares their sums. All but "mean", "median" and "multi-krum"
    are experimental: not measured on a real model."""
    malicious: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    """Share of a round's contributions that may be malicious, rounded down, and one at least."""
    mix: bool = False
    """If true, each change is replaced by the mean of its nearest neighbours before the rule sees it: for silos whose
    data differ much."""
    trusted: Name | None = Field(default=None, examples=["north"])
    """The silo or edge whose change the others are measured by; needed by the rule "fltrust", and only there.
    Experimental, as that rule is."""

    @property
    def active(self) -> bool:
        """Whether a contribution may be left out or changed."""
        return self.rule != "mean" or self.mix

    def faults(self, contributions: int) -> int:
        """f: how many of N contributions may be malicious."""
        return faults(self.malicious, contributions)

    def fewest(self, contributions: int) -> int:
        """The smallest N that the rule needs against f malicious ones, f as of so many contributions."""
        return fewest(self.rule, self.faults(contributions), mix=self.mix)


def faults(malicious: float, count: int) -> int:
    """f: this share of N, rounded down, and one at least: a rule that withstands none would be the mean in disguise."""
    return max(1, math.floor(malicious * count + 1e-9))


def fewest(rule: RuleName, faults: int, *, mix: bool) -> int:
    """The smallest N that withstands f malicious ones, with or without nearest-neighbour mixing."""
    a, b = NEEDS[rule]
    needed = a * faults + b
    return max(needed, MAJORITY[0] * faults + MAJORITY[1]) if mix else needed
