"""Where silos' rows come from: files of their own, or a part of one set."""

from __future__ import annotations

from isthmus.recipe.sections import PartitionSection, SiloSection


def check_partition(partition: PartitionSection | None, silos: tuple[SiloSection, ...], rounds: int) -> None:
    """Refuse silos without rows, unless nothing trains, and a set that no silo gets a part of.

    Args:
        rounds: of training.
    """
    without = [silo for silo in silos if not silo.train]
    if partition is None and without and rounds:
        raise ValueError(
            f"silo.train: {without[0].name!r} has no rows; name its files, or divide one set by [partition], "
            "which simulates a federation on one machine; or set train.rounds = 0, for inference only"
        )
    if partition is not None and not without:
        raise ValueError("partition: every silo has rows of its own; leave out [partition], or silo.train of some")
    both = [silo.name for silo in without if silo.held_out]
    if partition is not None and partition.held_out and both:
        raise ValueError(
            f"partition.held_out: {both[0]!r} has held_out rows of its own; leave out silo.held_out, or this share"
        )
