"""Evaluation on held-out rows."""

from __future__ import annotations

from collections.abc import Collection

from isthmus.recipe.sections import TrainSection


def check_evaluation(train: TrainSection, evaluating: Collection[str]) -> None:
    """Refuse evaluation that a recipe asks for without any rows for it.

    Args:
        evaluating: the silos that have held-out rows.
    """
    if train.rounds and train.evaluate not in (None, False) and not evaluating:
        raise ValueError(
            "train.evaluate: no silo has held_out rows; set train.evaluate = false, or name held_out files"
        )
