"""The rows of a recipe's silos in tokens, read and checked on this machine without a federation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from isthmus.data.bad_rows import BadRows
from isthmus.data.partitions import SiloPart, divided
from isthmus.data.row_count import check_row_count
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
    parts = None if recipe.partition is None else divided(recipe)
    for section in recipe.silo:
        read_sets(section, recipe, tokenizer, bad, parts=parts)
    bad.raise_any()


def summarize_data(recipe: Recipe, names: Sequence[str] = (), examples: int = 5) -> DataSummary:
    """The data of these silos, or of all.

    Args:
        names: silos of the recipe. Files of the others are not opened.
        examples: number of each silo's training rows to show, the first ones.

    Raises:
        RecipeError: the recipe has no such silo.
        DataError: the set of ``[partition]`` cannot be divided.
        ModelError: the model has no usable tokenizer, or no configuration.
    """
    tokenizer, vocabulary = load_tokenizer(Path(recipe.model.path)), _vocabulary(recipe.model.path)
    parts = {} if recipe.partition is None else divided(recipe)
    silos, read = [], []
    for name in names or [silo.name for silo in recipe.silo]:
        bad = BadRows()
        sets = dict(zip(KINDS, read_sets(recipe.party(name), recipe, tokenizer, bad, parts=parts), strict=True))
        for one in sets.values():
            with bad.collecting():
                one.check_vocabulary(vocabulary)
        if not bad.count:
            with bad.collecting():
                check_row_count(recipe, name, len(sets["train"].rows))
        read += [(name, kind, one) for kind, one in sets.items()]
        shown = [
            shown_example(place, row, tokenizer)
            for row, (place, _) in zip(sets["train"].rows[:examples], sets["train"].texts, strict=False)
        ]
        warnings = [warning for kind, one in sets.items() for warning in set_warnings(kind, one)]
        summaries = {kind: summarize_set(one, recipe.task.continuations) for kind, one in sets.items()}
        divided_by = _divided_by(recipe, parts.get(name))
        silos.append(SiloSummary(name, summaries, shown, warnings, divided_by, bad.count, _error(bad)))
    return DataSummary(silos, find_duplicates(read))


def _divided_by(recipe: Recipe, part: SiloPart | None) -> dict[str, int]:
    """A silo's rows by the value of the field that the set is divided by, the most frequent first."""
    if part is None or recipe.partition is None or recipe.partition.field is None:
        return {}
    field = recipe.partition.field
    return dict(Counter(str(row.fields[field]) for row in (*part.train, *part.held_out)).most_common())


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
