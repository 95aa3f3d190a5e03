"""Small updates of a real adapter: the bytes of one, and what it costs the next token's accuracy. A part of ``make
bench-federation``.

Ten Shakespearean speakers, stories260k. The baseline sends every number in fp32, open.
"""

from __future__ import annotations

from benchmarks.common.results import Results
from benchmarks.common.rows import Values
from benchmarks.federated.corpora import SPEAKING
from benchmarks.federated.simulation import merged
from benchmarks.federated.trials import tried

SILOS, SEEDS = 10, (0, 1)
BASE: Values = {"train": {"rounds": 24, "steps": 5, "learning_rate": 1e-2}, "federation": {"lora": "frozen-a"}}
SMALLER, LOST = 20.0, 0.5
"""Times, at least; points of accuracy, at most."""
WAYS: dict[str, Values] = {
    "open, sketch 20 %, 4 bits": {"compression": {"kind": "sketch", "keep": 0.2, "bits": 4}},
    "open, sketch 36 %, 4 bits": {"compression": {"kind": "sketch", "keep": 0.36, "bits": 4}},
    "masked, sketch 19 %, 4 bits": {"secure": True, "compression": {"kind": "sketch", "keep": 0.19, "bits": 4}},
}


def measure(results: Results) -> None:
    plain = [tried(SPEAKING, BASE, silos=SILOS, seed=seed) for seed in SEEDS]
    accuracy = sum(100 * one.final.accuracy for one in plain) / len(SEEDS)
    results.add("speakers, fp32 updates: accuracy of the next token", accuracy, "%")
    results.add("speakers, fp32 updates: loss", sum(one.final.loss for one in plain) / len(SEEDS), "nats")
    results.add("speakers, fp32 updates: bytes of an update", plain[0].update_bytes, "bytes")
    for name, federation in WAYS.items():
        changes = merged(BASE, {"federation": federation})
        trials = [tried(SPEAKING, changes, silos=SILOS, seed=seed) for seed in SEEDS]
        lost = accuracy - sum(100 * one.final.accuracy for one in trials) / len(SEEDS)
        smaller = plain[0].update_bytes / trials[0].update_bytes
        results.add(f"speakers, {name}: smaller than fp32", smaller, "×", at_least=SMALLER)
        results.add(f"speakers, {name}: accuracy lost", lost, "points", at_most=LOST)
        results.add(f"speakers, {name}: loss", sum(one.final.loss for one in trials) / len(SEEDS), "nats")
