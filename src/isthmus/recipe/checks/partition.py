"""Where silos' rows come from: files of their own, or a part of one set."""

from __future__ import annotations

from isthmus.recipe.sections import PartitionSection, SiloSection


def check_partition(partition: PartitionSection | None, silos: tuple[SiloSection, ...]) -> None:
    """Refuse silos without rows, and a set that no silo gets a part of."""
    without = [silo for silo in silos if not silo.train]
    if partition is None and without:
        raise ValueError(
            f"silo.train: {without[0].name!r} has no rows; name its files, or divide one set by [partition], "
            "which simulates a federation on one machine"
        )
    if partition is not None and not without:
        raise ValueError("partition: every silo has rows of its own; leave out [partition], or silo.train of some")
    both = [silo.name for silo in without if silo.held_out]
    if partition is not None and partition.held_out and both:
        raise ValueError(
            f"partition.held_out: {both[0]!r} has held_out rows of its own; leave out silo.held_out, or this share"
        )
