"""A local run on the terminal: a live table of each silo's progress, messages about failed silos, the privacy table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from isthmus.engines.local import run_federation
from isthmus.errors import BudgetExhausted
from isthmus.recipe import Recipe
from isthmus.report.formatting import NarrowTable, epsilon_text, megabytes, score_text
from isthmus.report.progress import SiloStatus, read_progress
from isthmus.report.spread import Spread, spread_of
from isthmus.storage.record import RunDirectory

REFRESH_SECONDS = 0.5
"""Time between two updates of the table."""
LINE_SECONDS = 10.0
"""Time between two lines of progress where the output is no terminal."""
SCORES = 4
"""Most scores of a silo in the table."""


def run_with_progress(run: RunDirectory, console: Console | None = None) -> None:
    """Run the federation of a run directory and show each silo's progress, then the privacy table.

    Args:
        console: where to print; None: standard output.

    Raises:
        IsthmusError: a role failed. The run can be resumed.
        BudgetExhausted: the privacy budgets allowed no silo to train on a row.
        Stopped: SIGINT or SIGTERM arrived. The run can be resumed.
    """
    recipe = run.recipe()
    console = console or Console()
    with _whole_lines(console), Live(console=console, refresh_per_second=4) as live:
        shown, said = time.monotonic(), ""

        def watch() -> None:
            nonlocal shown, said
            now = time.monotonic()
            if now - shown < (REFRESH_SECONDS if console.is_terminal else LINE_SECONDS):
                return
            shown = now
            if console.is_terminal:
                live.update(progress_table(statuses(run, recipe), recipe))
            elif (line := _line(run, recipe)) != said:
                notify(line)
                said = line

        def notify(message: str) -> None:
            live.console.print(message, style="yellow", highlight=False, markup=False, soft_wrap=True)

        run_federation(run, watch, notify)
        live.update(progress_table(statuses(run, recipe), recipe))
    from isthmus.report.privacy_table import read_statements, show  # imports the accountant: only after the run

    show(read_statements(run), console)
    if recipe.train.rounds and not any(silo.learned for silo in statuses(run, recipe)):
        raise BudgetExhausted(
            "nothing was learned: the privacy budgets allowed no silo to train on a row",
            remedy="allow more (privacy.record_epsilon, privacy.silo_epsilon), or let a row cost less: more noise, "
            "a smaller clip, fewer positions that cross (boundary.tail)",
        )


@contextmanager
def _whole_lines(console: Console) -> Iterator[None]:
    """End the last line of a live display where the output is not a terminal, which rich does not do."""
    try:
        yield
    finally:
        if not console.is_terminal:
            console.line()


def progress_table(silos: Sequence[SiloStatus], recipe: Recipe) -> Group:
    """Each silo's progress as a row, and below the table what holds for all."""
    train = recipe.train
    steps = (
        f"of {train.steps} step{'s' * (train.steps > 1)}"
        if train.epochs is None
        else f"with {train.epochs} passes over the rows"
    )
    table = NarrowTable(f"{train.rounds} rounds {steps}")
    table.names("silo")
    table.numbers("step", "loss", "tokens\n/s", "up", "down", "epsilon")
    shown = _shown_rounds({number for silo in silos for number in silo.scores})
    accurate = any("accuracy" in scores for silo in silos for scores in silo.scores.values()) or recipe.task.choices
    table.names(f"held-out\n{'accuracy' if accurate else 'loss'}")
    table.numbers("gain")
    spread = spread_of(silos)
    for progress in silos:
        table.cells(*_row(progress, recipe, shown), "" if spread is None else _gain(spread, progress.name))
    captions = [f"held-out: after round {', '.join(map(str, shown))}"] if shown else []
    captions += [
        f"{one.name}: {one.skipped} rows left out of steps, their budgets are spent" for one in silos if one.skipped
    ]
    captions += [_spread_text(spread)] if spread is not None and len(silos) > 1 else []
    if any(silo.evaluation_seconds for silo in silos):
        captions.append(_evaluation_text(silos))
    return Group(table, *(Text(caption, style="dim") for caption in captions))


def _line(run: RunDirectory, recipe: Recipe) -> str:
    """The progress in one line, for output that is read line by line."""
    silos = statuses(run, recipe)
    losses = sorted(one.loss for one in silos if one.loss is not None)
    loss = f", loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else ""
    last = min(silos, key=lambda one: one.steps)
    sent = megabytes(sum(one.sent_bytes for one in silos))
    return f"step {_steps(last, recipe)} ({last.name} is last){loss}, {sent} up"


def _steps(progress: SiloStatus, recipe: Recipe) -> str:
    """Steps that are made, and of how many."""
    if recipe.train.epochs is not None:
        return str(progress.steps)
    return f"{progress.steps}/{recipe.train.rounds * recipe.steps(progress.name)}"


def statuses(run: RunDirectory, recipe: Recipe) -> list[SiloStatus]:
    """Each silo's progress so far."""
    own = recipe.train.epochs is not None
    return [read_progress(run, silo.name, None if own else recipe.steps(silo.name)) for silo in recipe.silo]


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
        _steps(progress, recipe),
        "" if progress.loss is None else f"{progress.loss:.3f}",
        "" if progress.tokens_per_second is None else f"{progress.tokens_per_second:.0f}",
        megabytes(progress.sent_bytes),
        megabytes(progress.received_bytes),
        epsilon_text(progress.epsilon),
        "  ".join(score_text(progress.scores[number]) for number in shown if number in progress.scores),
    )
