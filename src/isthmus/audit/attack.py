"""Attacking a run or a recipe: what an adversary recovers of a silo's text from what it sees."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from transformers.utils import logging as transformers_logging

from isthmus.attacks.catalogue import ATTACKS
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.score import Figure
from isthmus.attacks.view.view import ADVERSARIES
from isthmus.audit.capture import Source
from isthmus.audit.judge import Judge, Result, Sensitive
from isthmus.audit.scenario import Order, Scenario, Tell
from isthmus.engines.threads import set_threads
from isthmus.errors import AttackError, RunError
from isthmus.model.device import find_device
from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory, writing

__all__ = ["NAME", "Order", "Result", "attack", "note", "opened", "table"]
NAME = "attack.json"
COLUMNS = {
    "token_accuracy": "token accuracy",
    "exact_match": "exact rows",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
    "bleu4": "BLEU-4",
    "accuracy": "accuracy",
    "majority": "majority",
    "task_accuracy": "the task's own",
    "auc": "AUC",
    "tpr_at_1_fpr": "TPR at 1 % FPR",
    "top1": "named first",
    "top10": "among the first ten",
    "chance": "by chance",
}
"""Figures that are shown, and how they are called."""


def opened(path: Path) -> Source:
    """The recipe or run directory at this path.

    Raises:
        RunError, RecipeError: it is neither.
    """
    if path.is_dir():
        run = RunDirectory.open(path)
        return Source(run.recipe(), run)
    return Source(Recipe.read(path))


def attack(source: Source, order: Order, tell: Tell, sensitive: Sensitive | None = None) -> list[Result]:
    """Make every attack of the order by every adversary of it.

    Args:
        tell: gets a sentence now and then.
        sensitive: which tokens of a row are; scored apart then.

    Raises:
        RecipeError: torch has no such device here.
        AttackError: an attack that is unknown or that an adversary cannot make, or the rows do not suffice.
    """
    _check(order)
    device = find_device(order.device)
    set_threads(source.recipe)
    transformers_logging.disable_progress_bar()
    scenario = Scenario(source, order, tell)
    judge = Judge(scenario, order.inference, sensitive)
    results: list[Result] = []
    for adversary in order.adversaries:
        knowledge = Knowledge(scenario.view(adversary), order.references, device)
        for name in order.attacks:
            tell(f"{adversary}: {name}")
            started = time.perf_counter()
            with device:
                found = ATTACKS[name](knowledge)
            seconds = time.perf_counter() - started
            view = knowledge.view
            own_rows = max(len(view.pairs), len(view.taught), len(view.own))
            results += judge.results((adversary, name), found, seconds, own_rows)
    return results


def note(run: RunDirectory, results: Sequence[Result]) -> Path:
    """Write the results into the run directory, in place of earlier ones of the same attacks."""
    path = run.path / NAME
    made = {(one.adversary, one.attack, one.victim) for one in results}
    earlier = [one for one in _noted(path) if (one["adversary"], one["attack"], one["victim"]) not in made]
    with writing(path) as temporary:
        temporary.write_text(json.dumps([*earlier, *map(asdict, results)], indent=1) + "\n", encoding="utf-8")
    return path


def table(results: Sequence[Result]) -> Group:
    """The results for a terminal, in per cent with their intervals; a table for each kind of figures."""
    kinds: dict[tuple[str, ...], list[Result]] = {}
    for one in results:
        kinds.setdefault(tuple(name for name in COLUMNS if name in one.figures), []).append(one)
    return Group(*(_table(names, rows) for names, rows in kinds.items()))


def _table(names: Sequence[str], results: Sequence[Result]) -> Table:
    shown = Table("adversary", "attack", "of", *(COLUMNS[name] for name in names), "s", "notes")
    for one in results:
        cells = [_percent(one.figures[name]) for name in names]
        shown.add_row(one.adversary, one.attack, one.tokens, *cells, f"{one.seconds:.0f}", "; ".join(one.notes))
    return shown


def _check(order: Order) -> None:
    for given, known in ((order.attacks, tuple(ATTACKS)), (order.adversaries, ADVERSARIES)):
        if unknown := [one for one in given if one not in known]:
            raise AttackError(f"there is no {unknown[0]!r}", remedy=f"use one of: {', '.join(known)}")
    if order.references < 0:
        raise AttackError(f"{order.references} references", remedy="ask for none, or for two or more")
    if order.rows < 1 or order.own_rows < 2:
        raise AttackError(f"{order.rows} rows, {order.own_rows} own rows", remedy="ask for 1 and 2 rows at least")
    if order.inference and "identify" in order.attacks:
        raise AttackError("candidates are training rows", remedy="leave --inference out to identify them")


def _noted(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        noted: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [one for one in noted if {"adversary", "attack", "victim"} <= one.keys()]
    except (ValueError, AttributeError, TypeError) as error:
        raise RunError(f"{path} is no record of attacks", remedy="move the file away") from error


def _percent(figure: Figure) -> str:
    return f"{100 * figure.value:.1f} [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"
