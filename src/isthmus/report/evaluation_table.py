"""What silos' models answered, as tables and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from isthmus.engines.evaluation import FEDERATED, Contrast, SiloEvaluation
from isthmus.report.data_table import visible
from isthmus.report.formatting import TABLE_WIDTH, NarrowTable
from isthmus.tasks.metrics import ClassScore, Score, class_scores

MOST_CLASSES = 12
"""Classes of a table of right and given answers; with more, the most frequent confusions are listed."""
LABEL = 10
"""Characters that a table of right and given answers leaves at least for the classes at its left."""
MOST_COLUMNS = 3
"""Measures side by side in a row; more stand below each other."""
INTERVAL = 1.96
"""Standard errors to either side of a value that its interval of 95 % has."""


def evaluations_json(evaluations: Sequence[SiloEvaluation], comparisons: Sequence[Contrast] = ()) -> str:
    """Measures of each silo and model as a JSON object; a standard error that is not known is null."""

    def scores_of(scores: Mapping[str, Score]) -> dict[str, object]:
        return {
            name: {"value": score.value, "error": _finite(score.error), "count": score.count}
            for name, score in scores.items()
        }

    def written(one: SiloEvaluation) -> dict[str, object]:
        pairs = [{"right": right, "given": given, "rows": count} for (right, given), count in one.confusion.items()]
        return {
            "silo": one.silo,
            "model": one.model,
            "rows": len(one.predictions),
            "skipped": one.skipped,
            "majority": one.majority,
            "scores": scores_of(one.scores),
            "confusion": pairs,
            "classes": {name: _written_class(score) for name, score in class_scores(one.confusion).items()},
        }

    compared = [
        {"silo": one.silo or None, "minus": one.baseline, "rows": one.rows, "differences": scores_of(one.differences)}
        for one in comparisons
    ]
    values = {"silos": [written(one) for one in evaluations], "comparisons": compared}
    return json.dumps(values, indent=2, allow_nan=False)


def show_evaluations(
    evaluations: Sequence[SiloEvaluation], console: Console, comparisons: Sequence[Contrast] = ()
) -> None:
    """Print each silo's measures with their standard errors, how far the run is from its baselines, and what was given
    in place of what."""
    several = any(one.model != FEDERATED for one in evaluations)
    table = NarrowTable("measures with standard errors, in per cent")
    table.names("silo", *["model"] * several)
    table.numbers("rows")
    wide = len(evaluations[0].scores) <= MOST_COLUMNS - several
    if wide:
        table.numbers(*(name.replace("_", " ") for name in evaluations[0].scores))
    else:
        table.names("measure")
        table.numbers("value")
    if any(one.majority is not None for one in evaluations):
        table.numbers("commonest")
    for one in evaluations:
        rows = f"{len(one.predictions):,}" + (f" ({one.skipped:,} spent)" if one.skipped else "")
        common = [] if one.majority is None else [f"{100 * one.majority:.1f}"]
        first = [one.silo, one.model, rows] if several else [one.silo, rows]
        if wide:
            table.cells(*first, *map(_cell, one.scores.values()), *common)
            continue
        for name, score in one.scores.items():
            table.cells(*first, name.replace("_", " "), _cell(score), *common)
    console.print(table)
    if comparisons:
        _show_comparisons(comparisons, console)
    for one in evaluations:
        if one.confusion:
            _show_confusion(one, console)


def _show_comparisons(comparisons: Sequence[Contrast], console: Console) -> None:
    table = NarrowTable("federated minus baseline, in points, by paired rows")
    table.names("silo", "baseline", "measure")
    table.numbers("rows", "difference", "95 % interval")
    for one in comparisons:
        for name, score in one.differences.items():
            cells = (name.replace("_", " "), f"{one.rows:,}", f"{100 * score.value:+.1f}", _interval(score))
            table.cells(one.silo or "all silos", one.baseline, *cells)
    console.print(table)


def _interval(score: Score) -> str:
    if math.isnan(score.error):
        return "–"
    low, high = (100 * (score.value + side * INTERVAL * score.error) for side in (-1, 1))
    return f"{low:+.1f} to {high:+.1f}"


def _cell(score: Score) -> str:
    error = "" if math.isnan(score.error) else f" ± {100 * score.error:.1f}"
    return f"{100 * score.value:.1f}{error}"


def _show_confusion(one: SiloEvaluation, console: Console) -> None:
    title = one.silo if one.model == FEDERATED else f"{one.silo}, {one.model}"
    _show_classes(one, title, console)
    classes = sorted({name for pair in one.confusion for name in pair})
    headings = _headings(one, classes)
    if headings is None:
        wrong = sorted(((n, pair) for pair, n in one.confusion.items() if pair[0] != pair[1]), reverse=True)
        for count, (right, given) in wrong[:MOST_CLASSES]:
            console.print(f"{title}: {count} × {right!r} taken for {given!r}", highlight=False, markup=False)
        return
    console.print(f"{title}: right (rows) and given (columns)", highlight=False, markup=False)
    table = NarrowTable()
    table.names("")
    table.numbers(*headings)
    for right, heading in zip(classes, headings, strict=True):
        label = visible(right) if headings[0] == visible(classes[0]) else f"{heading} {visible(right)}"
        table.cells(label, *(str(one.confusion.get((right, given), 0)) for given in classes))
    console.print(table)


def _headings(one: SiloEvaluation, classes: Sequence[str]) -> Sequence[str] | None:
    """The classes as columns: their names if these fit, else their numbers; None if a table of them does not fit."""
    if len(classes) > MOST_CLASSES:
        return None
    digits = len(str(max(one.confusion.values())))
    numbers = [str(number) for number in range(1, len(classes) + 1)]
    for headings in ([visible(name) for name in classes], numbers):
        if sum(1 + max(digits, cell_len(heading)) for heading in headings) <= TABLE_WIDTH - LABEL:
            return headings
    return None


def _show_classes(one: SiloEvaluation, title: str, console: Console) -> None:
    """A table of the classes; of many those with the least F1."""
    scores = class_scores(one.confusion)
    shown = sorted(scores, key=lambda name: scores[name].f1)[:MOST_CLASSES] if len(scores) > MOST_CLASSES else scores
    some = f", {len(shown)} of {len(scores)} with the least F1" if len(shown) < len(scores) else ""
    table = Table(title=Text(f"{title}: classes{some}, in per cent"))
    table.add_column("class", overflow="fold")
    for heading in ("rows", "given", "precision", "recall", "F1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in shown:
        score = scores[name]
        shares = (score.precision, score.recall, score.f1)
        cells = ("–" if math.isnan(share) else f"{100 * share:.1f}" for share in shares)
        table.add_row(_cell_text(name), f"{score.count:,}", f"{score.given:,}", *cells)
    console.print(table)


def _cell_text(name: str) -> Text:
    """A class as data name it, for a cell: no markup, no command to a terminal."""
    return Text(visible(name))


def _written_class(score: ClassScore) -> dict[str, object]:
    shares = {"precision": score.precision, "recall": score.recall, "f1": score.f1}
    return {"count": score.count, "given": score.given} | {name: _finite(value) for name, value in shares.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
