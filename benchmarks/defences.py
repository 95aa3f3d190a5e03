"""What a bottleneck learns to let cross, by what it is taught: the same channel, the same rows, other lessons.

``make bench-defences``. A channel wide and clean enough to leak (sixteen numbers of a text's last position, at most 23
bits), in a federation of two silos on hutto sentiment, one round each way. No gradient crosses, so what crosses is
learned inside the silos alone. Runs are kept in ``build/privacy``.
"""

from __future__ import annotations

import statistics

from benchmarks.privacy import labels_recovered
from benchmarks.results import Results
from benchmarks.runs import Values, federation
from isthmus.engines.attack import Order, attack
from isthmus.engines.capture import Source
from isthmus.report.record import RunDirectory, read_journal

LESSONS: dict[str, dict[str, float] | None] = {
    "as drawn": None,
    "the answer": {"answer": 1.0},
    "the answer, not the text (inverter)": {"answer": 1.0, "inverter": 0.5},
    "the answer, in few nats (capacity)": {"answer": 1.0, "capacity": 0.1},
    "the answer, unlike the text (distance correlation)": {"answer": 1.0, "correlation": 1.0},
}
STEPS, LAST = 30, 10
VICTIMS, OWN, CANDIDATES = 40, 300, 500
CHANNEL = {"width": 16, "forward": {"clip": 1.0, "noise": 0.1}}


def main() -> None:
    results = Results("defences", "make bench-defences")
    for number, (name, weights) in enumerate(LESSONS.items()):
        run = federation(f"defence-{number}", lambda values, weights=weights: taught(values, weights))
        measure(results, name, run)
    print(f"written: {results.write()}")


def taught(values: Values, weights: dict[str, float] | None) -> None:
    """The private recipe with a shallower bottom, a wider channel and these lessons."""
    values["model"] |= {"bottom": 8, "top": 4}
    values["boundary"] |= CHANNEL
    if weights is not None:
        values["boundary"]["defence"] = weights
    values["train"] |= {"rounds": 1, "steps": STEPS, "evaluate": False}
    values["threads"] = 1


def measure(results: Results, name: str, run: RunDirectory) -> None:
    """What the trunk with a colluding silo makes of what crosses."""
    source = Source(run.recipe(), run)
    learned, guessed = labels_recovered(source)
    results.add(f"{name}: labels read off what crosses (majority {guessed:.3f})", learned, "share")
    order = Order(("trunk+silo",), ("identify",), "east", "west", VICTIMS, OWN, candidates=CANDIDATES)
    (found,) = attack(source, order, lambda told: print(f"  {told}", flush=True))
    for figure in ("top1", "top10"):
        results.add(f"{name}: named among {CANDIDATES} candidates, {figure}", found.figures[figure].value, "share")
        results.add(
            f"{name}: named among {CANDIDATES} candidates, {figure}, upper", found.figures[figure].high, "share"
        )
    lines = read_journal(run.role("east").path / "metrics.jsonl")
    told = [line["told"] for line in lines if line["event"] == "step" and "told" in line][-LAST:]
    for term in ("answer", "inverter", "capacity", "correlation") if told else ():
        mean = statistics.fmean(one[term] for one in told)
        results.add(f"{name}: in training, {term}", mean, "0 to 1" if term == "correlation" else "nats")


if __name__ == "__main__":
    main()
