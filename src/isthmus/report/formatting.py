"""How figures are written in a table's cells."""

from __future__ import annotations

import math


def epsilon_text(value: float | None) -> str:
    """As a cell shows it; empty where there is none."""
    if value is None:
        return ""
    return "∞" if math.isinf(value) else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def score_text(scores: dict[str, float]) -> str:
    return f"{scores['accuracy']:.1%}" if "accuracy" in scores else f"{scores['loss']:.3f}"
