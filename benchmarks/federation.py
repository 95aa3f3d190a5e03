"""Aggregation: what it costs to sum updates under masks, and how exact it is. ``make bench-federation``."""

from __future__ import annotations

from benchmarks import aggregation, sums
from benchmarks.results import Results


def main() -> None:
    results = Results("federation", "make bench-federation")
    sums.measure(results)
    aggregation.measure(results)
    print(f"written: {results.write()}")


if __name__ == "__main__":
    main()
