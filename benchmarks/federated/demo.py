"""The demo's table for several draws of rows: one draw of eight rows a silo says little. ``make bench-demo``."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.common.results import Results
from isthmus.demo.play import play

CACHE = Path("build/demo")
SEEDS = (1, 2, 3)


def main() -> None:
    results = Results("demo", "make bench-demo")
    means: dict[str, list[float]] = {}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as temporary:
            started = time.perf_counter()
            run = play(Path(temporary) / "run", CACHE, quick=False, seed=seed)
            seconds = time.perf_counter() - started
            report(results, seed, json.loads((run.path / "demo.json").read_text()), seconds, means)
    for column, values in means.items():
        results.add(f"mean over seeds: {column}", statistics.mean(values), "accuracy")
    for other in ("zero-shot", "alone"):
        gaps = [ours - theirs for ours, theirs in zip(means["federation"], means[other], strict=True)]
        results.add(f"federation above {other}: mean over seeds", statistics.mean(gaps), "accuracy", at_least=0.0)
        results.add(f"federation above {other}: lowest seed", min(gaps), "accuracy")
    print(f"written: {results.write()}")


def report(results: Results, seed: int, told: dict, seconds: float, means: dict[str, list[float]]) -> None:
    """One draw's table, bytes and times."""
    for column, scores in told["accuracy"].items():
        for silo, accuracy in scores.items():
            results.add(f"seed {seed}: {column}, {silo}", accuracy, "accuracy")
        mean = statistics.mean(scores.values())
        results.add(f"seed {seed}: {column}, mean", mean, "accuracy")
        means.setdefault(column, []).append(mean)
    results.add(f"seed {seed}: bytes up", told["bytes"]["up"] / 1e6, "MB")
    results.add(f"seed {seed}: bytes down", told["bytes"]["down"] / 1e6, "MB")
    results.add(f"seed {seed}: federation", told["federation_seconds"], "s")
    results.add(f"seed {seed}: whole demo", seconds, "s", at_most=900)


if __name__ == "__main__":
    main()
