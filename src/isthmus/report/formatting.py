"""Tables with many columns, and numbers as text for their cells."""

from __future__ import annotations

import math
from typing import Any

from rich.box import SIMPLE

NARROW: dict[str, Any] = {"box": SIMPLE, "padding": (0, 0, 0, 1), "pad_edge": False}
"""Arguments of a ``rich.table.Table`` with many columns, which has to fit 80 characters."""


def epsilon_text(value: float | None) -> str:
    """An epsilon with three significant digits, ``∞`` without a bound, empty for None."""
    if value is None:
        return ""
    return "∞" if math.isinf(value) else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def megabytes(size: int) -> str:
    """A number of bytes in megabytes (10⁶ bytes)."""
    return f"{size / 1e6:.1f} MB"


def score_text(scores: dict[str, float]) -> str:
    """The ``accuracy`` in per cent if there is one, else the ``loss``."""
    return f"{scores['accuracy']:.1%}" if "accuracy" in scores else f"{scores['loss']:.3f}"
