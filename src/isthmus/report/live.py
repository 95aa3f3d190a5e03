"""A local run on the terminal: a live table of each silo's progress, messages about failed silos, the privacy table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from isthmus.engines.local import run_federation
from isthmus.recipe import Recipe
from isthmus.report.formatting import epsilon_text, megabytes, score_text
from isthmus.report.progress import SiloStatus, read_progress
from isthmus.report.spread import Spread, spread_of
from isthmus.storage.record import RunDirectory

REFRESH_SECONDS = 0.5
"""Time between two updates of the table."""
SCORES = 6
"""Most scores of a silo in the table."""


def run_with_progress(run: RunDirectory, console: Console | None = None) -> None:
    """Run the federation of a run directory and show each silo's progress, then the privacy table.

    Args:
        console: where to print; None: standard output.

    Raises:
        IsthmusError: a role failed. The run can be resumed.
        Stopped: SIGINT or SIGTERM arrived. The run can be resumed.
    """
    recipe = run.recipe()
    console = console or Console()
    with _whole_lines(console), Live(console=console, refresh_per_second=4) as live:
        shown = 0.0

        def watch() -> None:
            nonlocal shown
            if time.monotonic() - shown >= REFRESH_SECONDS:
                live.update(_table(run, recipe))
                shown = time.monotonic()

        def notify(message: str) -> None:
            live.console.print(message, style="yellow", highlight=False, markup=False, soft_wrap=True)

        run_federation(run, watch, notify)
        live.update(_table(run, recipe))
    from isthmus.report.privacy_table import read_statements, show  # imports the accountant: only after the run

    show(read_statements(run), console)


@contextmanager
def _whole_lines(console: Console) -> Iterator[None]:
    """End the last line of a live display where the output is not a terminal, which rich does not do."""
    try:
        yield
    finally:
        if not console.is_terminal:
            console.line()


def _table(run: RunDirectory, recipe: Recipe) -> Table:
    train = recipe.train
    steps = (
        f"of {train.steps} step{'s' * (train.steps > 1)}"
        if train.epochs is None
        else f"with {train.epochs} passes over the rows"
    )
    table = Table(title=f"{train.rounds} rounds {steps}")
    table.add_column("silo")
    for heading in ("step", "loss", "tokens/s", "up", "down", "epsilon"):
        table.add_column(heading, justify="right")
    own = train.epochs is not None
    silos = [read_progress(run, silo.name, None if own else recipe.steps(silo.name)) for silo in recipe.silo]
    shown = _shown_rounds({number for silo in silos for number in silo.scores})
    rounds = f" after round {', '.join(map(str, shown))}" if shown else ""
    accurate = any("accuracy" in scores for silo in silos for scores in silo.scores.values()) or recipe.task.choices
    table.add_column(f"held-out {'accuracy' if accurate else 'loss'}{rounds}")
    table.add_column("gain", justify="right")
    spread = spread_of(silos)
    for progress in silos:
        table.add_row(*_row(progress, recipe, shown), "" if spread is None else _gain(spread, progress.name))
    captions = [_spread_text(spread)] if spread is not None and len(silos) > 1 else []
    if any(silo.evaluation_seconds for silo in silos):
        captions.append(_evaluation_text(silos))
    table.caption = "\n".join(captions) or None
    return table


def _shown_rounds(measured: set[int]) -> list[int]:
    """The rounds whose scores fit into the table: the first, which training starts from, and the last ones."""
    rounds = sorted(measured)
    return rounds if len(rounds) <= SCORES else [rounds[0], *rounds[1 - SCORES :]]


def _evaluation_text(silos: Sequence[SiloStatus]) -> str:
    """What evaluations took of all the silos' time and bytes."""
    seconds, steps = sum(one.evaluation_seconds for one in silos), sum(one.step_seconds for one in silos)
    own = sum(one.evaluation_bytes for one in silos)
    whole = sum(one.sent_bytes + one.received_bytes for one in silos)
    spent = [one.evaluation_epsilon for one in silos if one.evaluation_epsilon is not None]
    epsilon = f", epsilon {epsilon_text(max(spent))} of a held-out record" if spent else ""
    return (
        f"of which evaluations: {100 * seconds / (seconds + steps):.0f} % of the silos' time, "
        f"{megabytes(own)} of the {megabytes(whole)} up and down{epsilon}"
    )


def _gain(spread: Spread, name: str) -> str:
    """A silo's gain over its score before the first round: points of accuracy, or decrease of loss."""
    gain = spread.gains.get(name)
    if gain is None:
        return ""
    return f"{100 * gain:+.1f}" if spread.measure == "accuracy" else f"{gain:+.3f}"


def _spread_text(spread: Spread) -> str:
    worst, mean, deviation = (
        score_text({spread.measure: value}) for value in (spread.worst, spread.mean, spread.deviation)
    )
    return f"after round {spread.round}: worst {spread.silo} with {worst}, mean {mean}, deviation {deviation}"


def _row(progress: SiloStatus, recipe: Recipe, shown: Sequence[int]) -> tuple[str, ...]:
    return (
        progress.name,
        str(progress.steps)
        if recipe.train.epochs is not None
        else f"{progress.steps}/{recipe.train.rounds * recipe.steps(progress.name)}",
        "" if progress.loss is None else f"{progress.loss:.3f}",
        "" if progress.tokens_per_second is None else f"{progress.tokens_per_second:.0f}",
        megabytes(progress.sent_bytes),
        megabytes(progress.received_bytes),
        epsilon_text(progress.epsilon) + (f" ({progress.skipped} rows spent)" if progress.skipped else ""),
        "  ".join(score_text(progress.scores[number]) for number in shown if number in progress.scores),
    )
