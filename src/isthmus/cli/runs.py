"""Commands that run a whole federation on this machine, and what is made of a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from isthmus.cli.app import AsJson, RecipePath, Round, RunPath, command, finish, notes_aside, notify

if TYPE_CHECKING:
    from isthmus.recipe import Recipe


class Baseline(StrEnum):
    """The baselines of a run."""

    alone = "alone"
    pooled = "pooled"


@command("run recipe.toml --run-dir runs/first")
def run(
    recipe: Annotated[Optional[Path], typer.Argument(help="The federation's recipe (TOML).")] = None,  # noqa: UP045
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The run directory to create.")] = Path("runs/latest"),
    resume: Annotated[Optional[Path], typer.Option(help="Continue the run in this directory.")] = None,  # noqa: UP045
    baseline: Annotated[
        Optional[Baseline],  # noqa: UP045
        typer.Option(help="Train instead what the run is compared with: each silo alone, or one model on all rows."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a whole federation on this machine."""
    from isthmus.engines.local import create_run, open_resumed
    from isthmus.errors import RecipeError
    from isthmus.recipe import Recipe
    from isthmus.report.live import run_with_progress, statuses
    from isthmus.storage.record import RunDirectory

    if (recipe is None) == (resume is None):
        raise RecipeError("give either a recipe or --resume", remedy="isthmus run RECIPE, or isthmus run --resume DIR")
    if baseline is not None:
        _train_baseline(recipe, resume or run_dir, baseline.value, as_json)
        return
    with notes_aside(as_json):
        if resume is not None:
            directory = open_resumed(resume)
        else:
            assert recipe is not None
            read = Recipe.read(recipe, undecided=True)
            if read.model.cut == "auto":
                RunDirectory.require_free(run_dir)
                read = _measured_cut(read)
            directory = create_run(read, run_dir)
        run_with_progress(directory)
    path = directory.path
    values = {"run_dir": path, "silos": [asdict(one) for one in statuses(directory, directory.recipe())]}
    follows = f"isthmus generate {path} PROMPT; isthmus evaluate {path}; isthmus export {path} OUT; "
    completed, rounds = directory.completed(), directory.recipe().train.rounds
    if completed < rounds:
        notify(f"ended early, after {completed} of {rounds} rounds; go on with 'isthmus run --resume {path}'")
    finish(values, as_json, f"run directory: {path}", following=f'{follows}in Python: isthmus.open("{path}")')


@command("flower recipe.toml app")
def flower(
    recipe: RecipePath,
    out: Annotated[Path, typer.Argument(help="The folder to write the app to.")],
    simulation: Annotated[bool, typer.Option(help="For Flower's simulation: the app starts the federation.")] = False,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Of a simulation: its run directory.")] = Path(
        "runs/flower"
    ),
    as_json: AsJson = False,
) -> None:
    """Write a Flower app that carries a federation's rounds, for 'flwr run'."""
    from isthmus.engines.flower.app import simulation_command, write_app
    from isthmus.recipe import Recipe

    read = Recipe.read(recipe)
    write_app(read, out, simulate=simulation_command(recipe, run_dir) if simulation else ())
    values = {"folder": out, "silos": [silo.name for silo in read.silo]}
    if simulation:
        follows = f"flwr run {out} SUPERLINK --federation-config 'num-supernodes={len(read.silo)}' --stream"
    else:
        follows = (
            f"isthmus root {recipe} --flower /ABSOLUTE/root.sock; "
            f"isthmus silo {recipe} NAME --flower /ABSOLUTE/NAME.sock; "
            f"flwr run {out} SUPERLINK --run-config 'root=\"/ABSOLUTE/root.sock\"' --stream"
        )
    finish(values, as_json, f"Flower app: {out}", following=follows)


@command("abort runs/first")
def abort(run_dir: RunPath, as_json: AsJson = False) -> None:
    """End a federation early: its silos keep the rounds that are finished. Named where its root runs."""
    from isthmus.engines.early_end import end_early
    from isthmus.storage.record import RunDirectory

    run = RunDirectory.open(run_dir)
    completed, rounds = end_early(run), run.recipe().train.rounds
    text = f"{run_dir} ends after {completed} of {rounds} rounds; silos hear of it when they ask for the next one"
    values = {"run_dir": run_dir, "completed": completed, "rounds": rounds}
    finish(values, as_json, text, following=f"isthmus run --resume {run_dir}; deployed: start root and silos again")


@command("export runs/first adapter", name="export")
def export_run(
    run_dir: RunPath,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    round: Round = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's adapter as a PEFT folder for the uncut model."""
    from isthmus.engines.chosen_round import better_round
    from isthmus.engines.export import export_adapter
    from isthmus.storage.record import RunDirectory

    run = RunDirectory.open(run_dir)
    rounds = export_adapter(run, out, round)
    if (better := better_round(run, rounds)) is not None:
        notify(f"on held-out rows round {better} was better: isthmus export {run_dir} OUT --round best")
    values, text = {"rounds": rounds, "folder": out}, f"adapter after {rounds} rounds: {out}"
    finish(values, as_json, text, following=f'in Python: peft.PeftModel.from_pretrained(MODEL, "{out}")')


@command("demo --quick")
def demo(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The run directory to create.")] = Path("runs/demo"),
    cache: Annotated[Path, typer.Option(help="Folder for the model and the data.")] = Path("build/demo"),
    quick: Annotated[bool, typer.Option(help="Fewer rounds and no baselines.")] = False,
    seed: Annotated[int, typer.Option(help="The seed for the rows, their order and the initial adapters.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Run a demonstration: four silos fine-tune a small real model on real reviews, in about 15 minutes."""
    from isthmus.demo.play import play

    with notes_aside(as_json):
        run = play(run_dir, cache, quick=quick, seed=seed)
    found = json.loads((run.path / "demo.json").read_text(encoding="utf-8"))
    finish({"run_dir": run.path, **found}, as_json, following=f"isthmus privacy {run.path}; isthmus chat {run.path}")


def _train_baseline(recipe: Path | None, run_dir: Path, kind: Literal["alone", "pooled"], as_json: bool) -> None:
    """Train a baseline of a recipe, or of the run in this directory."""
    from isthmus.engines.baselines import baseline_run, train_baseline
    from isthmus.engines.local import open_resumed
    from isthmus.recipe import Recipe

    directory = open_resumed(run_dir) if recipe is None else baseline_run(Recipe.read(recipe, undecided=True), run_dir)
    with notes_aside(as_json):
        train_baseline(directory, kind, typer.echo)
    values, text = {"run_dir": directory.path, "baseline": kind}, f"run directory: {directory.path}"
    finish(values, as_json, text, following=f"isthmus evaluate {directory.path}")


def _measured_cut(recipe: Recipe) -> Recipe:
    """The recipe with the cut that a measurement on this machine chooses; its table is printed."""
    from rich.console import Console

    from isthmus.audit.cuts import cut_for_run
    from isthmus.report.cut_table import show_cuts

    choice = cut_for_run(recipe, notify)
    show_cuts(choice, Console())
    return recipe.with_cut(choice.bottom, choice.top)
