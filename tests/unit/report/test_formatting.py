"""Figures as a table's cells show them, and every table on a terminal of 80 columns."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table

from isthmus.attacks.score import Figure
from isthmus.audit.attack import FIGURE_COLUMNS, AttackResult, results_table
from isthmus.data.summary import DataSummary, Lengths, SetSummary, SiloSummary
from isthmus.demo import play
from isthmus.engines.cuts import CutFigures, CutLimits, Link, choose_cut
from isthmus.engines.evaluation import Contrast, SiloEvaluation
from isthmus.engines.privacy_plan import PrivacyPlan, RecordsPlan
from isthmus.privacy.accountant import Epsilon
from isthmus.privacy.statement import PathStatement, Statement
from isthmus.report import cut_table, data_table, evaluation_table, live, plan_table, privacy_table
from isthmus.report.formatting import epsilon_text, megabytes, score_text
from isthmus.report.progress import SiloStatus
from isthmus.tasks.metrics import Score
from tests.conftest import make_recipe


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (math.inf, "∞"), (0.0, "0"), (7.4321, "7.43"), (999.0, "999"), (123456.7, "123,457")],
)
def test_an_epsilon(value: float | None, text: str) -> None:
    assert epsilon_text(value) == text


def test_bytes_and_scores() -> None:
    assert megabytes(1_250_000) == "1.2 MB"
    assert score_text({"accuracy": 0.856, "loss": 1.0}) == "85.6%"
    assert score_text({"loss": 1.23456}) == "1.235"


def test_scores_of_neither_kind_are_refused() -> None:
    with pytest.raises(KeyError):
        score_text({"perplexity": 3.0})


NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=60)
"""Letters, signs and marks of all scripts, those that a terminal shows over two columns among them."""
SILOS = st.lists(NAMES, min_size=1, max_size=5, unique=True)
SHARES = st.sampled_from([0.0, 0.0123, 0.9876, 1.0])
WIDE = "北海道の病院" * 6 + "-with-a-very-long-name-" * 3


def _data(names: list[str], share: float) -> list[RenderableType]:
    rows = SetSummary(1_000_000, Lengths(1, 99_999.0, 99_999, 999_999), 9, 1_000_000, {})
    silos = [SiloSummary(name, {"train": rows, "held out": rows}, [], [], {}, 999_999, None) for name in names]
    return _printed(lambda console: data_table.show_data(DataSummary(silos, []), console))


def _evaluations(names: list[str], share: float) -> list[RenderableType]:
    """With few and many measures, without and beside baselines, classes named in all scripts."""
    score = Score(share, share, 9)
    measures = [{f"measure_{n}": score for n in range(count)} for count in (1, 2, 3, 6)]
    confusion = {(right, given): 99_999 for right in names for given in names}
    found: list[RenderableType] = []
    for scores in measures:
        for models in (["federated"], ["federated", "alone", "pooled"]):
            ones = [
                SiloEvaluation(name, scores, [], confusion if len(models) == 1 else {}, share, 999_999, model)
                for name in names
                for model in models
            ]
            compared = [Contrast(name, "pooled", 999_999, scores) for name in names] if len(models) > 1 else []
            found += _printed(partial(evaluation_table.show_evaluations, ones, comparisons=compared))
    return found


def _cuts(names: list[str], share: float) -> list[RenderableType]:
    sizes = 999_900_000_000, 123.4, 234.5, 999_900_000, 999_900_000, 12.0, 23.0, 4000, 999_900_000
    figures = CutFigures(100, 100, *sizes, share, (share, share), "linear", 24, 9)
    choices = [choose_cut(name, [figures], Link(0.1, 1e7, name), CutLimits(10**12, None)) for name in names]
    return [one for choice in choices for one in _printed(partial(cut_table.show_cuts, choice))]


def _plans(names: list[str], share: float) -> list[RenderableType]:
    groups = tuple(RecordsPlan(name, share, 9_999_999, 123_456.0, 9, 99_999.0, 9) for name in names)
    plans = [PrivacyPlan(name, 9, 1e5 * share, groups, 9) for name in names]
    return _printed(partial(plan_table.show_plans, plans, 1e-5))


def _privacy(names: list[str], share: float) -> list[RenderableType]:
    spent = PathStatement(9_999_999, 99_999_999_999, tuple(names), Epsilon(1e6 + share, "analytic"), 123_456.0)
    paths = dict.fromkeys(("forward", "gradient", "update"), spent)
    statements = [Statement(name, 1e-5, True, paths=paths, evaluations=paths, record_budget=9e5) for name in names]
    return _printed(partial(privacy_table.show, statements))


def _attacks(names: list[str], share: float) -> list[RenderableType]:
    figures = dict.fromkeys(FIGURE_COLUMNS, Figure(share, share, 1.0))
    results = [
        AttackResult("root+trunk", "gradient-matching", "north", 9, 9, 99_999.0, part, figures, tuple(names))
        for part in ("all", "candidates", *names)
    ]
    return [results_table(results)]


def _progress(names: list[str], share: float) -> list[RenderableType]:
    scores = {number: {"accuracy": share, "loss": 10 + share} for number in (0, 998, 999)}
    sizes = {"sent_bytes": 99_999_000_000, "received_bytes": 99_999_000_000}
    silos = [
        SiloStatus(name, 9999, 10 + share, 99_999.0, learned=True, epsilon=123_456.0, scores=scores, **sizes)
        for name in names
    ]
    recipe = make_recipe(Path("none"), silos=("north",), train={"rounds": 1000, "epochs": 9})
    return [live.progress_table(silos, recipe)]


def _demo(names: list[str], share: float) -> list[RenderableType]:
    columns = ("majority", "zero-shot", "alone", "federation", "pooled, uncut")
    scores = {column: dict.fromkeys(names, share) for column in columns}
    return _printed(lambda console: play.print_accuracies(console, scores))


def _printed(show: Callable[[Console], None]) -> list[RenderableType]:
    """What a function prints, one by one."""
    found: list[RenderableType] = []
    console = Console(file=io.StringIO(), width=80)
    console.print = lambda *shown, **_: found.extend(shown)  # type: ignore[method-assign]
    show(console)
    return found


TABLES = (_data, _evaluations, _cuts, _plans, _privacy, _attacks, _progress, _demo)


@pytest.mark.parametrize("made", TABLES)
@given(names=SILOS, share=SHARES)
@example(names=[WIDE, *(f"silo-{number:03}" for number in range(40))], share=1.0)
@example(names=["[red]x[/red]", "[/nothing]"], share=0.0)
@settings(max_examples=15, deadline=None)
def test_every_table_fits_80_columns_and_loses_nothing(
    made: Callable[[list[str], float], list[RenderableType]], names: list[str], share: float
) -> None:
    """Redirected, as to a file: each line fits; each cell is whole, though a name may stand on several lines."""
    tables = [one for shown in made(names, share) for one in _tables(shown)]
    assert tables
    for table in tables:
        out = io.StringIO()
        Console(file=out, width=80).print(table)
        assert max(map(cell_len, out.getvalue().splitlines())) <= 80
        _assert_whole(table, out.getvalue().splitlines())


def _tables(shown: RenderableType) -> list[Table]:
    if isinstance(shown, Group):
        return [one for part in shown.renderables for one in _tables(part)]
    return [shown] if isinstance(shown, Table) else []


def _assert_whole(table: Table, lines: list[str]) -> None:
    """Numbers stand on one line; the characters of the others are all there."""
    text = "\n".join(lines)
    letters = Counter("".join(text.split()))
    for column in table.columns:
        for cell in map(str, (column.header, *column.cells)):
            if column.no_wrap:
                assert all(line in text for line in cell.split("\n")), cell
        letters.subtract("".join("".join(map(str, (column.header, *column.cells))).split()))
    assert not {letter: count for letter, count in letters.items() if count < 0}
