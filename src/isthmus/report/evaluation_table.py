"""What silos' models answered, as tables and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from isthmus.engines.evaluation import SiloEvaluation
from isthmus.tasks.metrics import Score

MOST_CLASSES = 12
"""Classes of a table of right and given answers; with more, the most frequent confusions are listed."""


def evaluations_json(evaluations: Sequence[SiloEvaluation]) -> str:
    """Measures of each silo as a JSON object; a standard error that is not known is null."""

    def written(one: SiloEvaluation) -> dict[str, object]:
        scores = {
            name: {"value": score.value, "error": _finite(score.error), "count": score.count}
            for name, score in one.scores.items()
        }
        pairs = [{"right": right, "given": given, "rows": count} for (right, given), count in one.confusion.items()]
        return {
            "silo": one.silo,
            "rows": len(one.predictions),
            "skipped": one.skipped,
            "majority": one.majority,
            "scores": scores,
            "confusion": pairs,
        }

    return json.dumps({"silos": [written(one) for one in evaluations]}, indent=2, allow_nan=False)


def show_evaluations(evaluations: Sequence[SiloEvaluation], console: Console) -> None:
    """Print each silo's measures with their standard errors, and what was given in place of what."""
    table = Table(title="measures with standard errors, in per cent")
    table.add_column("silo")
    table.add_column("rows", justify="right")
    names = list(evaluations[0].scores)
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    if evaluations[0].majority is not None:
        table.add_column("commonest", justify="right")
    for one in evaluations:
        rows = f"{len(one.predictions):,}" + (f" ({one.skipped:,} spent)" if one.skipped else "")
        common = [] if one.majority is None else [f"{100 * one.majority:.1f}"]
        table.add_row(one.silo, rows, *(_cell(one.scores[name]) for name in names), *common)
    console.print(table)
    for one in evaluations:
        if one.confusion:
            _show_confusion(one, console)


def _cell(score: Score) -> str:
    error = "" if math.isnan(score.error) else f" ± {100 * score.error:.1f}"
    return f"{100 * score.value:.1f}{error}"


def _show_confusion(one: SiloEvaluation, console: Console) -> None:
    classes = sorted({name for pair in one.confusion for name in pair})
    if len(classes) > MOST_CLASSES:
        wrong = sorted(((n, pair) for pair, n in one.confusion.items() if pair[0] != pair[1]), reverse=True)
        for count, (right, given) in wrong[:MOST_CLASSES]:
            console.print(f"{one.silo}: {count} × {right!r} taken for {given!r}", highlight=False, markup=False)
        return
    table = Table(title=f"{one.silo}: right (rows) and given (columns)")
    table.add_column("")
    for name in classes:
        table.add_column(name, justify="right")
    for right in classes:
        table.add_row(right, *(str(one.confusion.get((right, given), 0)) for given in classes))
    console.print(table)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
