"""Live progress of a local run on the terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from isthmus.engines.local import run_federation
from isthmus.engines.roles import stoppable
from isthmus.recipe import Recipe
from isthmus.report.progress import SiloProgress, read_progress
from isthmus.report.record import RunDirectory

REFRESH_SECONDS = 0.5


def run_with_progress(run: RunDirectory, console: Console | None = None) -> None:
    """Run the federation of a run directory and show how each silo is doing."""
    recipe = run.recipe()
    console = console or Console()
    with stoppable(), Live(console=console, refresh_per_second=4) as live:
        shown = 0.0

        def watch() -> None:
            nonlocal shown
            if time.monotonic() - shown >= REFRESH_SECONDS:
                live.update(_table(run, recipe))
                shown = time.monotonic()

        run_federation(run, watch)
        live.update(_table(run, recipe))


def _table(run: RunDirectory, recipe: Recipe) -> Table:
    table = Table(title=f"{recipe.train.rounds} rounds of {recipe.train.steps} steps")
    for heading in ("silo", "step", "loss", "tokens/s", "up", "down", "held out after round 0, 1, …"):
        table.add_column(heading, justify="left" if heading in ("silo", "held out after round 0, 1, …") else "right")
    for silo in recipe.silo:
        table.add_row(*_row(read_progress(run, silo.name, recipe.train.steps), recipe))
    return table


def _row(progress: SiloProgress, recipe: Recipe) -> tuple[str, ...]:
    return (
        progress.name,
        f"{progress.steps}/{recipe.train.rounds * recipe.train.steps}",
        "" if progress.loss is None else f"{progress.loss:.3f}",
        "" if progress.tokens_per_second is None else f"{progress.tokens_per_second:.0f}",
        megabytes(progress.sent_bytes),
        megabytes(progress.received_bytes),
        "  ".join(score_text(progress.scores[number]) for number in sorted(progress.scores)),
    )


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def score_text(scores: dict[str, float]) -> str:
    return f"{scores['accuracy']:.1%}" if "accuracy" in scores else f"loss {scores['loss']:.3f}"
