"""How many contributions a rule takes to bear the malicious among them.

Letters: N contributions, f of them malicious.
"""

from __future__ import annotations

import math
from typing import Literal

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


def faults(malicious: float, count: int) -> int:
    """f: this share of N in whole contributions, one at least: a rule that bears none would be the mean in disguise."""
    return max(1, math.floor(malicious * count + 1e-9))


def fewest(rule: RuleName, faults: int, *, mix: bool) -> int:
    """The smallest N that bears so many, if need be with nearest-neighbour mixing in front."""
    a, b = NEEDS[rule]
    needed = a * faults + b
    return max(needed, MAJORITY[0] * faults + MAJORITY[1]) if mix else needed
