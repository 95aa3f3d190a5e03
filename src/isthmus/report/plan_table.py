"""What privacy budgets allow of a run that has not begun, as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console

from isthmus.engines.privacy_plan import MOST_PASSES, PrivacyPlan
from isthmus.report.formatting import NarrowTable, epsilon_text


def show_plans(plans: Sequence[PrivacyPlan], delta: float, console: Console) -> None:
    """Print a row for each silo's records of one limit, then what the plan cannot afford."""
    table = NarrowTable(f"what budgets allow, epsilon at delta {delta:g}")
    table.names("silo", "class")
    table.numbers("records", "epsilon\na pass", "limit", "passes:\nfewest", "\nmedian", "\nplanned")
    for plan in plans:
        for group in plan.groups:
            cells = epsilon_text(group.epsilon), epsilon_text(group.limit), _passes(group.fewest), _passes(group.median)
            table.cells(plan.silo, group.name, f"{group.records:,}", *cells, f"{plan.passes:.3g}")
    console.print(table)
    for line in ("epsilon a pass: of the record that costs most", *_warnings(plans)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _warnings(plans: Sequence[PrivacyPlan]) -> list[str]:
    lines = []
    for plan in plans:
        for group in plan.groups:
            if group.fewest < math.ceil(plan.passes):
                of = f" of class {group.name}" if group.name else ""
                lines.append(f"{plan.silo}: records{of} are left out of steps after {group.fewest} passes or more")
        if plan.silo_passes is not None:
            lines.append(
                f"{plan.silo}: privacy.silo_epsilon allows {_passes(plan.silo_passes)} passes, without updates"
            )
        if plan.spent:
            lines.append(f"{plan.silo}: nothing can be learned: no record can afford a pass")
    return lines


def _passes(count: float) -> str:
    return "any" if count >= MOST_PASSES else f"{count:,.0f}"
