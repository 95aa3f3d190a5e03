"""The privacy that a run's silos have spent, as a table and as JSON."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from isthmus.errors import RunError
from isthmus.privacy.accountant import Epsilon
from isthmus.privacy.statement import PathStatement, Statement, read_statement
from isthmus.recipe.tree import ROOT
from isthmus.report.formatting import epsilon_text
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


def as_json(statements: list[Statement]) -> str:
    """The statements as a JSON list; an epsilon without a bound is null."""
    return json.dumps([statement.to_dict() for statement in statements], indent=2, allow_nan=False)


def show(statements: list[Statement], console: Console) -> None:
    """Print the table, and below it an explanation of its rows."""
    delta = statements[0].delta
    table = Table(title=f"privacy spent, epsilon at delta {delta:g}")
    for heading in ("silo", "path"):
        table.add_column(heading)
    for heading in ("releases", "bytes"):
        table.add_column(heading, justify="right")
    table.add_column("mechanism")
    for heading in ("worst record", "median record", "budget left"):
        table.add_column(heading, justify="right")
    table.add_column("ledger verified")
    for statement in statements:
        for cells in _rows(statement):
            table.add_row(*cells)
        table.add_section()
    console.print(table)
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


def _rows(statement: Statement) -> list[tuple[str, ...]]:
    if not statement.verified:
        return [(statement.silo, "", "", "", "", "", "", "", f"no: {statement.reason}")]
    rows = [_path_row(statement.silo, path, spent) for path, spent in statement.paths.items()]
    rows += [_path_row(statement.silo, f"{path}, held out", spent) for path, spent in statement.evaluations.items()]
    records = "1 record" if statement.records == 1 else f"{statement.records} records"
    records += f", {statement.evaluated_records} of them held out" if statement.evaluations else ""
    left = epsilon_text(statement.record_left)
    rows.append(
        (statement.silo, "record", "", "", records, *_pair(statement.worst, statement.median), left, "yes"),
    )
    if "update" in statement.paths:
        rows.append((statement.silo, "with updates", "", "", "", *_pair(statement.with_updates, None), "", ""))
    left = epsilon_text(statement.silo_left)
    rows.append((statement.silo, "silo", "", "", "", *_pair(statement.whole, None), left, ""))
    return rows


def _path_row(silo: str, path: str, spent: PathStatement) -> tuple[str, ...]:
    mechanisms = "\n".join(spent.mechanisms)
    return (silo, path, f"{spent.releases}", f"{spent.bytes:,}", mechanisms, *_pair(spent.worst, spent.median), "", "")


def _pair(worst: Epsilon, median: float | None) -> tuple[str, str]:
    return epsilon_text(worst.value), epsilon_text(median)
