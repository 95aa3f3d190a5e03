"""Silos' measures as tables that fit a terminal, and as JSON."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from isthmus.engines.evaluation import Contrast, Prediction, SiloEvaluation
from isthmus.report.evaluation_table import evaluations_json, show_evaluations
from isthmus.tasks.metrics import Score


def evaluation(classes: int = 2) -> SiloEvaluation:
    names = [f"class {number}" for number in range(classes)]
    confusion = {(name, names[0]): 3 + number for number, name in enumerate(names)}
    predictions = [Prediction("f:1", "class 0", "class 0", {"class 0": -0.5})] * 4
    scores = {"accuracy": Score(0.75, 0.25, 4), "macro_f1": Score(0.5, math.nan, 1)}
    return SiloEvaluation("north", scores, predictions, confusion, 0.6, 2)


def shown(*evaluations: SiloEvaluation) -> str:
    console = Console(file=io.StringIO(), width=80)
    show_evaluations(evaluations, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_measures_stand_with_their_errors() -> None:
    text = shown(evaluation())
    (row,) = (line for line in text.splitlines() if "north" in line and "75.0" in line)
    for cell in ("4 (2 spent)", "75.0 ± 25.0", "50.0", "60.0"):
        assert cell in row
    assert "nan" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_confusions_are_a_table_or_the_most_frequent_ones() -> None:
    assert "north: right (rows) and given (columns)" in shown(evaluation(3))
    many = shown(evaluation(30))
    assert "north: 32 × 'class 29' taken for 'class 0'" in many
    assert "class 1'" not in many


@pytest.mark.parametrize("confusion", [{}, {("a", "b"): 1}])
def test_json_has_no_numbers_that_json_has_not(confusion: dict[tuple[str, str], int]) -> None:
    one = evaluation()
    written = json.loads(evaluations_json([SiloEvaluation("north", one.scores, one.predictions, confusion, None, 0)]))
    (silo,) = written["silos"]
    assert silo["scores"]["macro_f1"] == {"value": 0.5, "error": None, "count": 1}
    assert silo["majority"] is None
    assert silo["confusion"] == [{"right": "a", "given": "b", "rows": 1} for _ in confusion]


def test_a_run_stands_beside_its_baselines() -> None:
    pooled = replace(evaluation(), model="pooled", confusion={})
    apart = Contrast("north", "pooled", 4, {"accuracy": Score(-0.25, 0.1, 4), "macro_f1": Score(0.0, math.nan, 1)})
    both = [evaluation(), pooled], [apart, replace(apart, silo="")]
    console = Console(file=io.StringIO(), width=80)
    show_evaluations(both[0], console, both[1])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "federated" in text
    (row,) = (line.split() for line in text.splitlines() if "north" in line and "pooled" in line and " to " in line)
    assert row == ["north", "pooled", "accuracy", "4", "-25.0", "-44.6", "to", "-5.4"]
    assert "all silos" in text
    assert "nan" not in text
    written = json.loads(evaluations_json(*both))
    assert [one["model"] for one in written["silos"]] == ["federated", "pooled"]
    assert [one["silo"] for one in written["comparisons"]] == ["north", None]
    assert written["comparisons"][0]["differences"]["macro_f1"]["error"] is None


def test_five_measures_beside_baselines_fit_80_columns() -> None:
    names = ("token_f1", "exact_match", "rouge1", "rouge2", "rougeL")
    scores = {name: Score(1.0, 0.111, 4) for name in names}
    written = [
        replace(evaluation(), silo="northern-1", model=model, scores=scores, confusion={}, majority=None, skipped=0)
        for model in ("federated", "alone", "pooled")
    ]
    console = Console(file=io.StringIO(), width=80)
    show_evaluations(written, console, [Contrast("northern-1", "pooled", 4, scores)])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("100.0 ± 11.1") == 3 * len(names)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_each_class_has_its_scores() -> None:
    confused = {("yes", "yes"): 3, ("yes", "no"): 1, ("no", "yes"): 2, ("other", "no"): 1}
    text = shown(replace(evaluation(), confusion=confused))
    rows = {line.split()[1]: line.replace("│", " ").split() for line in text.splitlines() if line.startswith("│")}
    assert "north: classes, in per cent" in text
    assert rows["other"][:3] == ["other", "0", "1"] or "other" in rows
    assert ["yes", "4", "5", "60.0", "75.0", "66.7"] in [line.replace("│", " ").split() for line in text.splitlines()]
    assert ["other", "1", "0", "–", "0.0", "0.0"] in [line.replace("│", " ").split() for line in text.splitlines()]
    written = json.loads(evaluations_json([replace(evaluation(), confusion=confused)]))["silos"][0]["classes"]
    assert written["yes"] == {"count": 4, "given": 5, "precision": 0.6, "recall": 0.75, "f1": pytest.approx(2 / 3)}
    assert written["other"]["precision"] is None


def test_of_many_classes_the_worst_are_shown() -> None:
    confused = {(f"class {number:02}", "class 00" if number < 3 else f"class {number:02}"): 2 for number in range(30)}
    text = shown(replace(evaluation(), confusion=confused))
    assert "classes, 12 of 30 with the least F1" in text
    assert "class 01" in text
    assert "class 29" not in text


@pytest.mark.parametrize("name", ["[red]x[/red]", "\x1b[31mx", "a\nb", "[/nothing]"])
def test_names_of_classes_are_text_to_the_terminal(name: str) -> None:
    text = shown(replace(evaluation(), confusion={(name, name): 1, ("b", name): 1}))
    assert "\x1b" not in text
    assert repr(name)[1:-1] in text
