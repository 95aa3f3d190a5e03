"""How many training rows a silo may have, and needs, where ``train.epochs`` makes its steps follow from them."""

from __future__ import annotations

from isthmus.errors import DataError
from isthmus.recipe import Recipe


def check_row_count(recipe: Recipe, name: str, rows: int) -> None:
    """Refuse a number of training rows with which the silo could not take part; without ``train.epochs`` none.

    Raises:
        DataError: they are more than the recipe lets it have, or make fewer steps than the run has rounds.
    """
    refuse_more_rows(recipe, name, rows)
    refuse_idle_rounds(recipe, name, rows)


def refuse_more_rows(recipe: Recipe, name: str, rows: int) -> None:
    """Refuse more training rows than the recipe lets the silo have.

    Raises:
        DataError: they are more.
    """
    most = recipe.most_rows(name)
    if recipe.train.epochs is not None and rows > most:
        raise DataError(
            f"{name} has {rows:,} training rows; by the recipe it may have {most:,}",
            remedy=f"raise train.most_rows, or silo.most_rows of {name}, for all parties",
        )


def refuse_idle_rounds(recipe: Recipe, name: str, rows: int) -> None:
    """Refuse so few training rows that some round has no step of this silo.

    Raises:
        DataError: all its steps are fewer than the run's rounds.
    """
    train, steps = recipe.train, recipe.round_steps(name, 1, rows).total
    if train.epochs is not None and steps < train.rounds:
        raise DataError(
            f"{rows} rows make {steps} steps in train.epochs = {train.epochs}, fewer than the {train.rounds} rounds",
            remedy=f"lower train.rounds or train.batch, or raise train.epochs, for {name}",
        )
