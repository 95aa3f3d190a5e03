"""Recipes by which nothing trains (``train.rounds = 0``)."""

from __future__ import annotations

from isthmus.recipe.sections import FederationSection, TrainSection


def check_inference(train: TrainSection, federation: FederationSection) -> None:
    """Refuse what follows from the number of rounds where there are none."""
    if not train.rounds and federation.noise is not None:
        raise ValueError(
            "federation.noise: with train.rounds = 0 there is no sum to add noise to; leave federation.noise out, or "
            "raise train.rounds"
        )
