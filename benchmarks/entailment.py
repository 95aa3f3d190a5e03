"""The private recipe on a second task, SuperGLUE's RTE: does a hypothesis follow from a premise?

A part of ``make bench-privacy``. The boundary is the shipped one; prompt, answer and rows are RTE's. Texts are some
fifty tokens, twice as long as the first task's, and the answer depends on two sentences.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from benchmarks import runs
from benchmarks.channels import RUNGS, Size, climb
from benchmarks.results import Results
from benchmarks.runs import Values
from benchmarks.tasks import SHARED, TASKS, Rows, labelled, shuffled
from isthmus.engines.capture import Source
from isthmus.report.record import RunDirectory
from isthmus.tasks import metrics

LONGEST = 300
"""Characters of premise and hypothesis together."""
TRAINED = 688
"""Rows of each silo; those left over are public."""
ROUNDS, BATCH = 3, 16
SIZE = Size(victims=40, few=10, own=1200, candidates=300)


def measure(results: Results) -> None:
    """Accuracy with and without defence, and what the trunk with a colluding silo recovers."""
    open_run, private_run = (
        runs.federation(name, change) for name, change in (("rte-open", undefended), ("rte-private", entailment))
    )
    quality = {"no defence": runs.accuracy(open_run), "private recipe": runs.accuracy(private_run)}
    for name, value in quality.items():
        results.add(f"RTE: accuracy, {name}", value, "share")
    results.add("RTE: majority", majority(), "share")
    lost = 100 * (quality["no defence"] - quality["private recipe"])
    results.add("RTE: accuracy lost by the private recipe", lost, "points", at_most=2.0)
    attacked(results, private_run)


def attacked(results: Results, run: RunDirectory) -> None:
    """The private recipe's rung; what the search is worth where more crosses, the first task's ladder tells."""
    rung = next(rung for rung in RUNGS if not rung.changed)
    climb(results, Source(run.recipe(), run), SIZE, [replace(rung, few=True)], "RTE, ")


def entailment(values: Values) -> None:
    """RTE's rows, prompt and answers."""
    folder = rows()
    for silo in values["silo"]:
        silo |= {part: str(folder / silo["name"] / f"{part}.jsonl") for part in ("train", "held_out")}
    values["task"] = TASKS["rte"].template
    values["train"] |= {"rounds": ROUNDS, "steps": TRAINED // BATCH, "batch": BATCH}
    values["threads"] = 1


def undefended(values: Values) -> None:
    runs.undefended(values)
    entailment(values)


def rows() -> Path:
    """The folder with both silos' rows, written if it is not there: half of the short ones each."""
    folder = runs.CACHE.resolve() / "rte"
    if not folder.exists():
        train, held_out = (read(name) for name in ("train", "val"))
        for number, name in enumerate(("east", "west")):
            (folder / name).mkdir(parents=True)
            write(folder / name / "train.jsonl", train[number * TRAINED :][:TRAINED])
            write(folder / name / "held_out.jsonl", held_out[number::2])
    return folder


def read(name: str) -> Rows:
    return labelled(row for row in shuffled(SHARED / "superglue_rte" / f"{name}.jsonl") if short(row))


def short(row: Values) -> bool:
    return len(row["premise"]) + len(row["hypothesis"]) <= LONGEST


def write(path: Path, rows: Rows) -> None:
    runs.write_lines(path, [json.dumps(row) for row in rows])


def majority() -> float:
    """Of the held-out rows, the most frequent answer's share."""
    return metrics.majority([row["label"] for row in read("val")])
