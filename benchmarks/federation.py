"""Aggregation: what it costs to sum updates under masks, how exact it is, and how small updates get.

``make bench-federation``, or ``python -m benchmarks.federation PART ...`` for some of its parts.
"""

from __future__ import annotations

import sys

from benchmarks import aggregation, compression, sums, tiers
from benchmarks.results import Results


def main() -> None:
    parts = {
        "sums": sums.measure,
        "tiers": tiers.measure,
        "lora": aggregation.measure,
        "compression": compression.measure,
    }
    results = Results("federation", "make bench-federation")
    for part in sys.argv[1:] or parts:
        parts[part](results)
    print(f"written: {results.write(keep=len(sys.argv) > 1)}")


if __name__ == "__main__":
    main()
