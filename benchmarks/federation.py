"""Aggregation: what it costs to sum updates under masks, and how small updates get. ``make bench-federation``."""

from __future__ import annotations

from benchmarks import compression, sums
from benchmarks.results import Results


def main() -> None:
    results = Results("federation", "make bench-federation")
    sums.measure(results)
    compression.measure(results)
    print(f"written: {results.write()}")


if __name__ == "__main__":
    main()
