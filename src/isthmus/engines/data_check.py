"""The rows of a recipe's silos in tokens, read and checked on this machine without a federation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from isthmus.data.bad_rows import BadRows
from isthmus.data.silo_data import read_sets
from isthmus.data.summary import (
    KINDS,
    DataSummary,
    SiloSummary,
    find_duplicates,
    set_warnings,
    shown_example,
    summarize_set,
)
from isthmus.errors import DataError, ModelError
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


def summarize_data(recipe: Recipe, names: Sequence[str] = (), examples: int = 5) -> DataSummary:
    """The data of these silos, or of all.

    Args:
        names: silos of the recipe. Files of the others are not opened.
        examples: number of each silo's training rows to show, the first ones.

    Raises:
        RecipeError: the recipe has no such silo.
        ModelError: the model has no usable tokenizer, or no configuration.
    """
    tokenizer, vocabulary = load_tokenizer(Path(recipe.model.path)), _vocabulary(recipe.model.path)
    silos, read = [], []
    for name in names or [silo.name for silo in recipe.silo]:
        bad = BadRows()
        sets = dict(zip(KINDS, read_sets(recipe.party(name), recipe, tokenizer, bad), strict=True))
        for one in sets.values():
            with bad.collecting():
                one.check_vocabulary(vocabulary)
        read += [(name, kind, one) for kind, one in sets.items()]
        shown = [
            shown_example(place, row, tokenizer)
            for row, (place, _) in zip(sets["train"].rows[:examples], sets["train"].texts, strict=False)
        ]
        warnings = [warning for kind, one in sets.items() for warning in set_warnings(kind, one)]
        summaries = {kind: summarize_set(one, recipe.task.choices) for kind, one in sets.items()}
        silos.append(SiloSummary(name, summaries, shown, warnings, bad.count, _error(bad)))
    return DataSummary(silos, find_duplicates(read))


def _vocabulary(model: str) -> int:
    """Number of tokens that the model has."""
    try:
        size: int = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise ModelError(f"no usable config.json in {model}", remedy="check model.path") from error
    return size


def _error(bad: BadRows) -> str | None:
    try:
        bad.raise_any()
    except DataError as error:
        return str(error)
    return None
