"""The command ``isthmus attack``: runs attacks on a target, saves and shows their results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text
from transformers.utils import logging as transformers_logging

from isthmus.attacks.catalogue import ACTIVE, ATTACKS
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import ADVERSARIES
from isthmus.audit.judge import AttackResult, Judge, SensitiveMask
from isthmus.audit.scenario import AttackPlan, Scenario
from isthmus.audit.target import Target, open_target
from isthmus.engines.threads import set_threads
from isthmus.errors import AttackError, RunError
from isthmus.model.device import find_device
from isthmus.report.formatting import NarrowTable
from isthmus.storage.files import writing
from isthmus.storage.record import RunDirectory

__all__ = ["RESULTS_NAME", "AttackPlan", "AttackResult", "open_target", "results_table", "run_attacks", "save_results"]
RESULTS_NAME = "attack.json"
"""The file of results in a run directory."""
FIGURE_COLUMNS = {
    "token_accuracy": "token accuracy",
    "exact_match": "exact rows",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
    "bleu4": "BLEU-4",
    "accuracy": "accuracy",
    "majority": "majority label",
    "task_accuracy": "the model's own",
    "auc": "AUC",
    "tpr_at_1_fpr": "TPR at 1 % FPR",
    "top1": "top 1",
    "top10": "top 10",
    "chance": "by chance",
}
"""The measure's name by figure, in the order of the table."""


def run_attacks(
    target: Target, plan: AttackPlan, notify: Callable[[str], None], sensitive: SensitiveMask | None = None
) -> list[AttackResult]:
    """Run every attack of the plan by every adversary of the plan, and score them.

    Args:
        notify: called with messages about the progress.
        sensitive: marks the sensitive tokens of a row; they are then also scored separately.

    Raises:
        RecipeError: torch has no such device.
        AttackError: an unknown attack or adversary, an attack that needs what the adversary does not see, or too few
            rows.
    """
    _check(plan)
    device = find_device(plan.device)
    set_threads(target.recipe)
    transformers_logging.disable_progress_bar()
    scenario = Scenario(target, plan, notify)
    judge = Judge(scenario, plan.inference, sensitive)
    results: list[AttackResult] = []
    for adversary in plan.adversaries:
        knowledge = Knowledge(scenario.view(adversary), plan.references, device)
        for name in plan.attacks:
            notify(f"{adversary}: {name}")
            started = time.perf_counter()
            with device:
                recovered = ATTACKS[name](knowledge)
            seconds = time.perf_counter() - started
            view = knowledge.view
            own_rows = max(len(view.pairs), len(view.training_pairs), len(view.reference_rows))
            results += judge.results(adversary, name, recovered, seconds, own_rows)
    return results


def save_results(run: RunDirectory, results: Sequence[AttackResult]) -> Path:
    """Write the results to ``attack.json`` in the run directory. They replace earlier results of the same attacks.

    Returns:
        The file.

    Raises:
        RunError: the file exists and does not hold results of attacks.
    """
    path = run.path / RESULTS_NAME
    new = {(one.adversary, one.attack, one.victim) for one in results}
    earlier = [one for one in _saved(path) if (one["adversary"], one["attack"], one["victim"]) not in new]
    with writing(path) as temporary:
        temporary.write_text(json.dumps([*earlier, *map(asdict, results)], indent=1) + "\n", encoding="utf-8")
    return path


def results_table(results: Sequence[AttackResult]) -> Group:
    """The results for a terminal, a line per measure in per cent with its confidence interval, then the notes."""
    table = NarrowTable("recovered, in per cent")
    table.names("adversary", "attack", "of", "measure")
    table.numbers("value", "95 % interval", "s")
    for one in results:
        first = one.adversary, one.attack, one.tokens
        for number, name in enumerate(name for name in FIGURE_COLUMNS if name in one.figures):
            figure = one.figures[name]
            cells = _percent(figure.value), f"{_percent(figure.low)} to {_percent(figure.high)}"
            seconds = "" if number else f"{one.seconds:.0f}"
            table.cells(*(first if not number else ("", "", "")), FIGURE_COLUMNS[name], *cells, seconds)
    notes = [f"{one.adversary}, {one.attack}, {one.tokens}: {'; '.join(one.notes)}" for one in results if one.notes]
    return Group(table, *map(Text, notes))


def _check(plan: AttackPlan) -> None:
    for kind, given, known in (("attack", plan.attacks, ATTACKS), ("adversary", plan.adversaries, ADVERSARIES)):
        if unknown := [one for one in given if one not in known]:
            raise AttackError(f"there is no {kind} {unknown[0]!r}", remedy=f"use one of: {', '.join(known)}")
    if plan.references < 0:
        raise AttackError(f"{plan.references} reference models", remedy="use 0, or 2 or more")
    if plan.rows < 1 or plan.own_rows < 2:
        raise AttackError(
            f"{plan.rows} rows and {plan.own_rows} own rows", remedy="use at least 1 row and at least 2 own rows"
        )
    trained = [name for name in plan.attacks if name in ("identify", *ACTIVE)]
    if plan.inference and trained:
        raise AttackError(f"the attack {trained[0]} is of training rows", remedy="leave out --inference")


def _saved(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        saved: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [one for one in saved if {"adversary", "attack", "victim"} <= one.keys()]
    except (ValueError, AttributeError, TypeError) as error:
        raise RunError(f"{path} does not hold results of attacks", remedy="move the file away") from error


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
