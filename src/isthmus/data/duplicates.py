"""Training rows whose prompts are held out too: a model is then measured on what it has learned by heart."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.data.bad_rows import BadRows
from isthmus.data.templates import Example, Placed
from isthmus.errors import DataError
from isthmus.recipe.sections.train import DuplicatePolicy


def prompt_key(example: Example) -> str:
    """What two rows have in common that ask the same: the prompt, of plain text the text, whatever its case and white
    space."""
    return " ".join((example.answer if example.whole else example.prompt).casefold().split())


def repeated_prompts(train: Sequence[Placed], held_out: Sequence[Placed]) -> dict[int, str]:
    """The training rows whose prompts are held out, by number, each with the place of the first held-out row of it."""
    places: dict[str, str] = {}
    for place, example in held_out:
        places.setdefault(prompt_key(example), place)
    if not places:
        return {}
    keys = (prompt_key(example) for _, example in train)
    return {number: places[key] for number, key in enumerate(keys) if key in places}


def without_duplicates(
    train: list[Placed], held_out: Sequence[Placed], policy: DuplicatePolicy, bad: BadRows
) -> list[Placed]:
    """The training rows that stay, by ``train.duplicates``: with "drop" those whose prompts are not held out.

    Args:
        bad: gets an error for each other row, with "refuse".
    """
    if policy == "warn":
        return train
    found = repeated_prompts(train, held_out)
    if policy == "drop":
        return [one for number, one in enumerate(train) if number not in found]
    for number, place in found.items():
        with bad.collecting():
            raise DataError(
                f"{train[number][0]} has the prompt of {place}, which is held out",
                remedy='leave one of them out, or set train.duplicates = "drop"',
            )
    return train
