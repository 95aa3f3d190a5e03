"""Evaluation on held-out rows."""

from __future__ import annotations

from isthmus.recipe.sections import SiloSection, TrainSection


def check_evaluation(train: TrainSection, silos: tuple[SiloSection, ...]) -> None:
    """Refuse evaluation without any rows for it."""
    if train.evaluate and not any(silo.held_out for silo in silos):
        raise ValueError(
            "train.evaluate: no silo has held_out rows; set train.evaluate = false, or name held_out files"
        )
