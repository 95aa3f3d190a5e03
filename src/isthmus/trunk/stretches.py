"""Stretches of blocks that the same sequences pass: silos with different cuts enter and leave the trunk at different
blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Stretch:
    """Blocks of one pass, and who passes them."""

    blocks: range
    """Indices in the trunk."""
    rows: tuple[int, ...]
    """Indices of the sequences that pass all of these blocks; the others pass none of them."""


def stretches_of(passed: Sequence[range]) -> list[Stretch]:
    """The stretches of a pass, in their order, each as long as possible.

    Args:
        passed: the blocks that each sequence passes.
    """
    borders = sorted({border for blocks in passed for border in (blocks.start, blocks.stop)})
    found = []
    for start, stop in pairwise(borders):
        rows = tuple(row for row, blocks in enumerate(passed) if blocks.start <= start and stop <= blocks.stop)
        if rows:
            found.append(Stretch(range(start, stop), rows))
    return found
