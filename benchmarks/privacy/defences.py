"""Recovery through one channel whose bottleneck was trained for different objectives, on the same rows.

``make bench-defences``. Of every token sixteen numbers cross, at most 74 bits, enough to tell it. One silo trains on
hutto sentiment. No gradient crosses, so what crosses is learned inside the silo alone. A lesson is good if the label
can be read off the last position and the text cannot be read at all. Runs are kept in ``build/frontier``.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.common.results import DEVICE, Results
from benchmarks.privacy.frontier import Size, best_attack
from benchmarks.privacy.learned import TEACHER, learned
from benchmarks.privacy.points import Point
from benchmarks.privacy.privacy import labels_recovered
from benchmarks.privacy.tasks import TASKS
from isthmus.audit.scenario import AttackPlan, Scenario
from isthmus.audit.target import Target
from isthmus.demo.assets import smollm2
from isthmus.model.device import find_device
from isthmus.storage.journal import read_journal

LESSONS: dict[str, dict[str, float]] = {
    "as drawn": {},
    "the answer": {"answer": 1.0},
    "the answer, not the text (inverter)": {"answer": 1.0, "inverter": 0.5},
    "the answer, in few nats (capacity)": {"answer": 1.0, "capacity": 0.1},
    "the answer, unlike the text (distance correlation)": {"answer": 1.0, "correlation": 1.0},
}
TASK, STEPS, LAST = TASKS["hutto"], 80, 20
SIZE = Size(victims=40, own=400)


def main() -> None:
    results = Results("defences", "make bench-defences", find_device(DEVICE))
    base = smollm2(Path("build/demo")).resolve()
    for name, weights in LESSONS.items():
        point = channel(weights)
        measure(results, name, point, learned(TASK, base, point, f"lesson: {name}"))
        results.write(keep=True)
    print(f"written: {results.write()}")


def channel(weights: dict[str, float]) -> Point:
    """Wide and clean enough to leak, with these lessons."""
    shape = {"width": 16, "residual": True, "gradients": False} | ({"defence": weights} if weights else {})
    return Point((8, 4), "clipped", 0.01, shape, learned=STEPS)


def measure(results: Results, name: str, point: Point, source: Target) -> None:
    """Attacks by the trunk with a colluding silo on what crosses."""
    labels, guessed = labels_recovered(source)
    results.add(f"{name}: labels read off what crosses (majority {guessed:.3f})", labels, "share")
    order = AttackPlan(("trunk+silo",), ("linear",), "east", TEACHER, SIZE.victims, SIZE.own)
    attack, recovered, _ = best_attack(Scenario(source, order, lambda told: None), TASK, point, SIZE)
    results.add(f"{name}: text tokens recovered, best attack ({attack})", recovered["text"], "share")
    assert source.run is not None
    lines = read_journal(source.run.role(TEACHER).path / "metrics.jsonl")
    terms = [line["guard_terms"] for line in lines if line["event"] == "step" and "guard_terms" in line][-LAST:]
    for term in ("answer", "inverter", "capacity", "correlation") if terms else ():
        mean = statistics.fmean(one[term] for one in terms)
        results.add(f"{name}: in training, {term}", mean, "0 to 1" if term == "correlation" else "nats")


if __name__ == "__main__":
    main()
