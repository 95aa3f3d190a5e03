"""The privacy that a run's silos have spent, as a table and as JSON."""

from __future__ import annotations

from rich.console import Console

from isthmus.errors import RunError
from isthmus.privacy.accountant import Epsilon
from isthmus.privacy.statement import Statement, read_statement
from isthmus.recipe.tree import ROOT
from isthmus.report.formatting import NarrowTable, epsilon_text
from isthmus.storage.record import RunDirectory


def read_statements(run: RunDirectory) -> list[Statement]:
    """One statement per silo, and the root's if it adds noise to the published adapters, from the run's ledgers.

    In a deployed party's own folder: of those whose ledgers are there.

    Raises:
        RunError: no party that has a ledger ran here.
    """
    recipe = run.recipe()
    noise = recipe.federation.noise
    names = [*(silo.name for silo in recipe.silo), *([ROOT] if noise is not None and noise.where == "root" else [])]
    if run.deployed:
        names = [name for name in names if run.role(name).path.is_dir()]
    if not names:
        raise RunError(
            f"{run.path} holds no ledger: no silo ran here", remedy="name the run directory of 'isthmus silo'"
        )
    return [read_statement(run.role(name).path / "ledger.jsonl", name, recipe.privacy) for name in names]


def show(statements: list[Statement], console: Console) -> None:
    """Print a table a silo, and below them an explanation of their rows."""
    console.print(f"privacy spent, epsilon at delta {statements[0].delta:g}\n", highlight=False)
    for statement in statements:
        console.print(_title(statement), markup=False, highlight=False, style="bold")
        if statement.verified:
            console.print(_table(statement))
    console.print(
        "record: one record's hidden states and gradients, composed over all releases (row 'update': the silo's)\n"
        "held out: what measuring the model took; the rows above are training's and use's\n"
        "with updates: the same, with every update charged to every record\n"
        "silo: all releases, composed as if they were of one record\n"
        "summed: valid if at least the stated number of honest silos add noise to each sum; at the root: for any one "
        "silo, from all published adapters",
        highlight=False,
        style="dim",
    )


def _title(statement: Statement) -> str:
    if not statement.verified:
        return f"{statement.silo}: ledger not verified: {statement.reason}"
    records = "1 record" if statement.records == 1 else f"{statement.records:,} records"
    held_out = f", {statement.evaluated_records:,} of them held out" if statement.evaluations else ""
    return f"{statement.silo}: ledger verified, {records}{held_out}"


def _table(statement: Statement) -> NarrowTable:
    table = NarrowTable()
    table.add_column("path", min_width=18, no_wrap=True)
    table.numbers("releases", "bytes", "worst\nrecord", "median\nrecord", "budget\nleft")
    table.names("mechanism")
    paths = [*statement.paths.items(), *((f"{path}, held out", spent) for path, spent in statement.evaluations.items())]
    for path, spent in paths:
        sizes = f"{spent.releases:,}", f"{spent.bytes:,}"
        table.cells(path, *sizes, *_pair(spent.worst, spent.median), "", "\n".join(spent.mechanisms))
    table.cells("record", "", "", *_pair(statement.worst, statement.median), epsilon_text(statement.record_left), "")
    if "update" in statement.paths:
        table.cells("with updates", "", "", *_pair(statement.with_updates, None), "", "")
    table.cells("silo", "", "", *_pair(statement.whole, None), epsilon_text(statement.silo_left), "")
    return table


def _pair(worst: Epsilon, median: float | None) -> tuple[str, str]:
    return epsilon_text(worst.value), epsilon_text(median)
