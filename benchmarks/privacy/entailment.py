"""The private recipe on a second task, SuperGLUE's RTE: does a hypothesis follow from a premise?

A part of ``make bench-privacy``. The boundary is the shipped one; prompt, answer and rows are RTE's. Texts are some
fifty tokens, twice as long as the first task's, and the answer depends on two sentences.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from benchmarks.common.results import Results
from benchmarks.common.rows import SHARED, Rows, Values
from benchmarks.privacy import runs
from benchmarks.privacy.channels import RUNGS, Size, climb
from benchmarks.privacy.tasks import TASKS, labelled, shuffled
from isthmus.audit import capture
from isthmus.audit.target import Target
from isthmus.data.silo_data import SiloData
from isthmus.silo.join import load_tokenizer
from isthmus.storage.record import RunDirectory
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
    quality = {"no defence": accuracy(open_run), "private recipe": accuracy(private_run)}
    for name, value in quality.items():
        results.add(f"RTE: accuracy, {name}", value, "share")
    results.add("RTE: majority", metrics.majority([row["label"] for row in unseen()]), "share")
    lost = 100 * (quality["no defence"] - quality["private recipe"])
    results.add("RTE: accuracy lost by the private recipe", lost, "points", at_most=2.0)
    attacked(results, private_run)


def accuracy(run: RunDirectory) -> float:
    """Of the first silo on all rows that nobody trained on."""
    recipe, path = run.recipe(), runs.CACHE.resolve() / "rte" / "unseen.jsonl"
    write(path, unseen())
    silos = (recipe.silo[0].model_copy(update={"held_out": str(path)}), *recipe.silo[1:])
    recipe = recipe.model_copy(update={"silo": silos})
    rows = SiloData(silos[0], recipe, load_tokenizer(Path(recipe.model.path))).held_out
    return capture.measure_accuracy(Target(recipe, run), silos[0].name, rows)


def attacked(results: Results, run: RunDirectory) -> None:
    """The private recipe's rung; what the search is worth where more crosses, the first task's ladder tells."""
    rung = next(rung for rung in RUNGS if not rung.changed)
    climb(results, Target(run.recipe(), run), SIZE, [replace(rung, few=True)], "RTE, ")


def entailment(values: Values) -> None:
    """RTE's rows, prompt and answers."""
    folder = rows()
    for silo in values["silo"]:
        silo |= {part: str(folder / silo["name"] / f"{part}.jsonl") for part in ("train", "held_out")}
    values["task"] = TASKS["rte"].template
    values["train"] |= {"rounds": ROUNDS, "steps": TRAINED // BATCH, "batch": BATCH}
    values["threads"] = 1
    values.pop("privacy", None)  # its budget counts answers of one token


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


def unseen() -> Rows:
    """The validation rows, and the training rows that are left over."""
    return [*read("val"), *read("train")[2 * TRAINED :]]
