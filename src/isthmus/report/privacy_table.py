"""What a run's silos have spent of their privacy, as a table or as JSON."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from isthmus.privacy.accountant import Epsilon
from isthmus.privacy.statement import PathStatement, Statement, read_statement
from isthmus.recipe.tree import ROOT
from isthmus.report.formatting import epsilon_text
from isthmus.storage.record import RunDirectory


def read_statements(run: RunDirectory) -> list[Statement]:
    """One a silo, and the root's where it noises what it publishes, from the ledgers in the run directory."""
    recipe = run.recipe()
    noise = recipe.federation.noise
    names = [*(silo.name for silo in recipe.silo), *([ROOT] if noise is not None and noise.where == "root" else [])]
    return [read_statement(run.role(name).path / "ledger.jsonl", name, recipe.privacy) for name in names]


def as_json(statements: list[Statement]) -> str:
    return json.dumps([statement.to_dict() for statement in statements], indent=2, allow_nan=False)


def show(statements: list[Statement], console: Console) -> None:
    """A table, and below it what its figures mean."""
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
        "record: the epsilon of one record's hidden states and gradients, composed over all releases; of updates, the "
        "silo's\nwith updates: the same if each update is charged to every record\n"
        "silo: all that left, composed as if it were about one record\n"
        "summed: seen in no sum with the noise of fewer honest silos than the named, and in none without; at the root: "
        "what it published tells of any one silo",
        highlight=False,
        style="dim",
    )


def _rows(statement: Statement) -> list[tuple[str, ...]]:
    if not statement.verified:
        return [(statement.silo, "", "", "", "", "", "", "", f"no: {statement.reason}")]
    rows = [_path_row(statement.silo, path, told) for path, told in statement.paths.items()]
    records = "1 record" if statement.records == 1 else f"{statement.records} records"
    left = epsilon_text(statement.record_left)
    rows.append(
        (statement.silo, "record", "", "", records, *_pair(statement.worst, statement.median), left, "yes"),
    )
    if "update" in statement.paths:
        rows.append((statement.silo, "with updates", "", "", "", *_pair(statement.with_updates, None), "", ""))
    left = epsilon_text(statement.silo_left)
    rows.append((statement.silo, "silo", "", "", "", *_pair(statement.whole, None), left, ""))
    return rows


def _path_row(silo: str, path: str, told: PathStatement) -> tuple[str, ...]:
    mechanisms = "\n".join(told.mechanisms)
    return (silo, path, f"{told.releases}", f"{told.bytes:,}", mechanisms, *_pair(told.worst, told.median), "", "")


def _pair(worst: Epsilon, median: float | None) -> tuple[str, str]:
    return epsilon_text(worst.value), epsilon_text(median)
