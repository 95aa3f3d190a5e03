"""The plan's table fits 80 columns and says what cannot be afforded."""

from __future__ import annotations

import io
import math

from rich.console import Console

from isthmus.engines.privacy_plan import MOST_PASSES, PrivacyPlan, RecordsPlan
from isthmus.report.plan_table import show_plans

TIGHT = RecordsPlan("secret", 1.0, 12_345, 0.75, 1, 1.5, 3)
FREE = RecordsPlan("", math.inf, 8, math.inf, MOST_PASSES, float(MOST_PASSES), MOST_PASSES)


def shown(*plans: PrivacyPlan) -> str:
    console = Console(file=io.StringIO(), width=80)
    show_plans(plans, 1e-5, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_a_row_for_the_records_of_each_limit() -> None:
    text = shown(PrivacyPlan("north", 20_000, 4.0, (TIGHT, FREE), 3))
    cells = [line.split() for line in text.splitlines() if line.strip().startswith("north ")]
    assert cells[0] == ["north", "secret", "12,345", "0.75", "1", "1", "2", "4"]
    assert cells[1] == ["north", "8", "∞", "∞", "any", "any", "4"]
    assert "north: records of class secret are left out of steps after 1 passes or more" in text
    assert "north: privacy.silo_epsilon allows 3 passes, without updates" in text
    assert "nothing can be learned" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_plan_that_affords_nothing_says_so() -> None:
    none = RecordsPlan("", 0.1, 3, 0.75, 0, 0.0, 0)
    assert "south: nothing can be learned" in shown(PrivacyPlan("south", 3, 1.0, (none,), None))
    assert "nothing can be learned" not in shown(PrivacyPlan("south", 3, 1.0, (FREE,), None))


def test_a_silo_that_only_asks_lacks_nothing() -> None:
    text = shown(PrivacyPlan("north", 0, 0.0, (), None))
    assert "nothing can be learned" not in text
