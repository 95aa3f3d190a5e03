"""Tables with many columns, and numbers as text for their cells."""

from __future__ import annotations

import math

from rich.box import SIMPLE
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

TABLE_WIDTH = 80
"""Characters of a line that every table fits."""


class NarrowTable(Table):
    """A table that fits 80 characters. Names are broken over lines where it would be wider; numbers never are."""

    def __init__(self, title: str | None = None) -> None:
        super().__init__(title=None if title is None else Text(title), box=SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)

    def names(self, *headings: str) -> None:
        """Add columns of text."""
        for heading in headings:
            self.add_column(Text(heading), overflow="fold")

    def labels(self, *headings: str) -> None:
        """Add columns of words of ours, which stay on one line."""
        for heading in headings:
            self.add_column(Text(heading), no_wrap=True)

    def numbers(self, *headings: str) -> None:
        """Add columns of numbers, which stay on one line."""
        for heading in headings:
            self.add_column(Text(heading), justify="right", no_wrap=True)

    def cells(self, *cells: str | Text) -> None:
        """Add a row. Its text is shown as it is, without markup."""
        texts: list[RenderableType] = [Text(cell) if isinstance(cell, str) else cell for cell in cells]
        self.add_row(*texts)


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
