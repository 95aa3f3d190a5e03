"""The second table: how long silos take for the same samples in each way to share a trunk, beside the paper's times.

ReCoRD, one row a step. Time is the threads' own processor time without any network (``simulation``). *Sequential*: one
silo after another, so that the work of all adds up. *Shared* and *replica*: silos work at once, each as if on a machine
of its own, with one trunk; it computes what waits in one pass, with one adapter or one of each silo.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

from benchmarks.common.results import Results
from benchmarks.common.rows import SHARED, Rows, Values, read
from benchmarks.federated.corpora import rows_file
from benchmarks.federated.simulation import federate, recipe_of
from benchmarks.federated.tables.cells import Cell, digest, recipe_digest
from benchmarks.federated.tables.quality import LORA, Setting
from benchmarks.federated.tables.sets import SOURCES
from benchmarks.federated.tables.uncut import UncutModel
from isthmus.data.tokens import Tokens
from isthmus.recipe import Recipe

SAMPLES = 16
"""Of all silos together; the paper has 1,000."""
SILOS = (2, 4, 8)
MAX_TOKENS = 256
WAYS: dict[str, Values] = {
    "sequential": {"together": 1},
    "shared": {"adapter": "shared"},
    "replica": {"adapter": "replica"},
}
CENTRAL = "centralized"
PAPER = {"sequential": (689, 689, 689), "shared": (630, 542, 489), "replica": (348, 174, 86)}
"""Seconds with 2, 4 and 8 silos, 1,000 samples of ReCoRD (FedSEA-LLaMA)."""
PAPER_CENTRAL = 382


def run(setting: Setting) -> None:
    """Measure the cells that are missing."""
    central(setting).measured(lambda: centralized(setting))
    for silos in SILOS:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as temporary:
                recipe = recipe_for(setting, Path(temporary), way, silos)
                cell_of(recipe, way, silos).measured(
                    lambda recipe=recipe, folder=Path(temporary): timed(recipe, folder)
                )


def report(results: Results, setting: Setting) -> None:
    """Times of the cells that there are, as shares of the centralized time."""
    whole = central(setting).found()
    if whole is None:
        print("parallel: not measured")
        return
    results.add(f"parallel, {CENTRAL}, {SAMPLES} samples: processor time", whole["seconds"], "s")
    for at, silos in enumerate(SILOS):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as temporary:
                found = cell_of(recipe_for(setting, Path(temporary), way, silos), way, silos).found()
            name = f"parallel, {way}, {silos} silos"
            if found is None:
                print(f"{name}: not measured")
                continue
            spent = found["summed" if way == "sequential" else "side_by_side"]
            results.add(f"{name}: time beside centralized", spent / whole["seconds"], "ratio")
            results.add(f"{name}: time beside centralized, the paper's", PAPER[way][at] / PAPER_CENTRAL, "ratio")


def rows() -> Rows:
    """The samples, each a row of its own with one question."""
    found = read(SHARED / "superglue_record" / "train32.jsonl")[:SAMPLES]
    return [row | {"qas": row["qas"][:1]} for row in found]


def recipe_for(setting: Setting, folder: Path, way: str, silos: int) -> Recipe:
    """A federation of these silos, among whom the samples are dealt."""
    files = {
        f"silo-{number}": {"train": rows_file(folder / f"{number}.jsonl", rows()[number::silos])}
        for number in range(silos)
    }
    values: Values = {
        "task": SOURCES["record"].task,
        "lora": LORA,
        "train": {"rounds": 1, "steps": SAMPLES // silos, "batch": 1, "max_tokens": MAX_TOKENS},
        "trunk": WAYS.get(way, {}),
    }
    return recipe_of(setting.model, files, values, setting.device)


def timed(recipe: Recipe, folder: Path) -> Values:
    (times,) = federate(recipe, folder).times
    return {"side_by_side": times.side_by_side, "summed": times.summed}


def centralized(setting: Setting) -> Values:
    """The uncut model on the same samples."""
    with tempfile.TemporaryDirectory() as temporary:
        model = UncutModel(recipe_for(setting, Path(temporary), CENTRAL, 1), setting.device)
        read = [one.tokens for one in model.rows(Path(temporary) / "0.jsonl")]

        def one_by_one() -> Iterator[list[Tokens]]:
            return ([row] for row in cycle(read))

        start = time.process_time()
        model.train(one_by_one(), SAMPLES, 1e-3)
        return {"seconds": time.process_time() - start}


def central(setting: Setting) -> Cell:
    return Cell(f"parallel/{CENTRAL}", about(setting))


def cell_of(recipe: Recipe, way: str, silos: int) -> Cell:
    model = Path(recipe.model.path).name
    return Cell(f"parallel/{way}-{silos}", {"model": model, "rows": digest(rows()), "recipe": recipe_digest(recipe)})


def about(setting: Setting) -> Values:
    return {"model": setting.model.name, "rows": digest(rows()), "lora": LORA, "max_tokens": MAX_TOKENS}
