"""The federation: what summing under masks costs, how exact aggregation is, how small updates get, and how well, how
fast, how fairly and how safely real models learn.

``make bench-federation``, or ``python -m benchmarks.federated.federation PART ...`` for some of its parts.
"""

from __future__ import annotations

import sys

from benchmarks.common.results import Results
from benchmarks.federated import (
    aggregation,
    compression,
    convergence,
    fairness,
    poisoned,
    silo_privacy,
    sums,
    tiers,
    update_bytes,
)


def main() -> None:
    parts = {
        "sums": sums.measure,
        "tiers": tiers.measure,
        "lora": aggregation.measure,
        "compression": compression.measure,
        "speakers": convergence.speakers,
        "opinions": convergence.opinions,
        "poisoned": poisoned.measure,
        "fairness": fairness.measure,
        "silo-privacy": silo_privacy.measure,
        "update-bytes": update_bytes.measure,
    }
    results = Results("federation", "make bench-federation")
    for part in sys.argv[1:] or parts:
        parts[part](results)
    print(f"written: {results.write(keep=len(sys.argv) > 1)}")


if __name__ == "__main__":
    main()
