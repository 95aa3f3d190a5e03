"""The rows of a recipe's silos in tokens, read and checked on this machine without a federation."""

from __future__ import annotations

from pathlib import Path

from isthmus.data.bad_rows import BadRows
from isthmus.data.silo_data import read_sets
from isthmus.recipe import Recipe
from isthmus.silo.join import load_tokenizer


def check_lengths(recipe: Recipe) -> None:
    """Count the tokens of all rows of all silos.

    Raises:
        DataError: a row cannot be used, or is longer than the recipe allows. The first few are named, with the number
            of all.
        ModelError: the model has no usable tokenizer.
    """
    bad, tokenizer = BadRows(), load_tokenizer(Path(recipe.model.path))
    for section in recipe.silo:
        read_sets(section, recipe, tokenizer, bad)
    bad.raise_any()
