"""The command ``isthmus demo``: a federation of real processes, its baselines, and one prompt to the result."""

from __future__ import annotations

import itertools
import json
import sys
import time
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.data.silo_data import SiloData
from isthmus.demo.assets import hutto, smollm2
from isthmus.engines.baselines import BASELINES, baseline_scores, train_baseline
from isthmus.engines.inference import generate_text
from isthmus.engines.local import local_recipe
from isthmus.recipe import Recipe
from isthmus.report.formatting import NarrowTable, megabytes
from isthmus.report.live import run_with_progress
from isthmus.report.progress import read_progress
from isthmus.silo.join import load_tokenizer
from isthmus.storage.files import writing
from isthmus.storage.record import RunDirectory
from isthmus.tasks import metrics

TRAIN_ROWS = 8
"""Training rows per silo: few, which is where a federation helps most."""
HELD_OUT_ROWS = 60
"""Held-out rows per silo."""
QUICK_ROUNDS = 2
PROMPT = "What should a critic write about a film she loved?"
AccuracyTable = dict[str, dict[str, float]]
"""Held-out accuracy, 0 to 1, by column and silo."""


def play(run_dir: Path, cache: Path, *, quick: bool, seed: int) -> RunDirectory:
    """Run the whole demo and print its table.

    Args:
        run_dir: the run directory to create; if it holds a run, ``-2``, ``-3``, … is appended to its name.
        cache: folder for the model and the data.
        quick: fewer rounds, no baselines.
        seed: fixes the rows, their order and the initial adapters.

    Returns:
        The run directory. It also holds the table, as ``demo.json``.
    """
    console = Console()
    console.print("[bold]isthmus demo[/bold]: four silos, one trunk, one language model between them\n")
    run = _free(run_dir)
    directory = RunDirectory.create(run, local_recipe(demo_recipe(cache, quick=quick, seed=seed), run))
    recipe = directory.recipe()
    started = time.perf_counter()
    run_with_progress(directory, console)
    seconds = time.perf_counter() - started
    if not quick:
        for kind in BASELINES:
            train_baseline(directory, kind, lambda line: console.print(f"  {line}", highlight=False))
    scores = _scores(directory, recipe, quick=quick)
    crossed = _crossed(directory, recipe)
    _record(directory, scores, crossed, seconds)
    print_accuracies(console, scores)
    console.print(
        f"federation: {seconds:.0f} s; {megabytes(crossed['up'])} of noised hidden states and gradients sent, "
        f"{megabytes(crossed['down'])} received; no text, label, mask or position left a silo",
        highlight=False,
    )
    console.print(f"\n[bold]One prompt through the split model[/bold]\n{PROMPT}\n", highlight=False)
    sys.stdout.flush()
    generate_text(directory, PROMPT, None, max_new_tokens=48, chat=True)
    console.print(f"\nrun directory: {directory.path}", highlight=False, soft_wrap=True)
    return directory


def demo_recipe(cache: Path, *, quick: bool, seed: int) -> Recipe:
    """The demo's recipe with the paths of its model and data, which are downloaded on first use."""
    values: dict[str, Any] = tomllib.loads(files("isthmus.demo").joinpath("demo.toml").read_text(encoding="utf-8"))
    values["seed"] = seed
    values["model"]["path"] = str(smollm2(cache).resolve())
    silo_files = hutto(cache, rows=TRAIN_ROWS, held_out=HELD_OUT_ROWS, seed=seed)
    for silo in values["silo"]:
        silo["train"] = str(silo_files[silo["name"]].train.resolve())
        silo["held_out"] = str(silo_files[silo["name"]].held_out.resolve())
    if quick:
        values["train"]["rounds"] = QUICK_ROUNDS
    return Recipe.of(values)


def _scores(run: RunDirectory, recipe: Recipe, *, quick: bool) -> AccuracyTable:
    """The columns of the table. The silos have measured zero-shot and federation during the run."""
    progress = [read_progress(run, silo.name, recipe.train.steps) for silo in recipe.silo]
    zero_shot = {silo.name: silo.scores[0]["accuracy"] for silo in progress}
    federation = {silo.name: silo.scores[recipe.train.rounds]["accuracy"] for silo in progress}
    if quick:
        return {"zero-shot": zero_shot, "federation": federation}
    alone, pooled = (
        {name: scores["accuracy"] for name, scores in baseline_scores(run, kind).items()} for kind in BASELINES
    )
    return {
        "majority": _majority(recipe),
        "zero-shot": zero_shot,
        "alone": alone,
        "federation": federation,
        "pooled, uncut": pooled,
    }


def _majority(recipe: Recipe) -> dict[str, float]:
    """Held-out accuracy, 0 to 1, of always giving the silo's most common answer, by silo."""
    tokenizer = load_tokenizer(Path(recipe.model.path))
    silos = [SiloData(silo, recipe, tokenizer) for silo in recipe.silo]
    return {silo.name: metrics.majority([tuple(row.answer) for row in silo.held_out]) for silo in silos}


def _crossed(run: RunDirectory, recipe: Recipe) -> dict[str, int]:
    """Bytes of all silos' frames: ``up`` to the trunk, ``down`` from it."""
    progress = [read_progress(run, silo.name, recipe.train.steps) for silo in recipe.silo]
    return {
        "up": sum(silo.sent_bytes for silo in progress),
        "down": sum(silo.received_bytes for silo in progress),
    }


def _record(run: RunDirectory, scores: AccuracyTable, crossed: dict[str, int], seconds: float) -> None:
    with writing(run.path / "demo.json") as temporary:
        results = {"accuracy": scores, "bytes": crossed, "federation_seconds": round(seconds, 1)}
        temporary.write_text(json.dumps(results, indent=1))


def print_accuracies(console: Console, scores: AccuracyTable) -> None:
    """Print a table of held-out accuracy, a row a silo and one of their means."""
    table = NarrowTable("accuracy on held-out rows")
    table.names("silo")
    table.numbers(*scores)
    for silo in next(iter(scores.values())):
        table.cells(silo, *(f"{by_silo[silo]:.1%}" for by_silo in scores.values()))
    table.add_section()
    table.cells("mean", *(f"{sum(by_silo.values()) / len(by_silo):.1%}" for by_silo in scores.values()))
    console.print(table)


def _free(run_dir: Path) -> Path:
    """``run_dir``, or the first of ``run_dir-2``, ``run_dir-3``, … that holds no run."""
    numbered = (run_dir.with_name(f"{run_dir.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([run_dir], numbered) if not (path / "recipe.toml").exists())
