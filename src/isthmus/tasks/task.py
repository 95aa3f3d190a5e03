"""A task: how rows of a data set become questions to a language model, and how its answers are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from isthmus.errors import DataError

Fields = Mapping[str, Any]
Ranking = Literal["total", "length", "unconditioned"]
"""How choices are ranked: by log-probability; by log-probability divided by characters; or by log-probability after the
prompt minus that after nothing. lm-eval's ``acc``, ``acc_norm`` and ``acc_mutual_info``."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a row, and its answer."""

    prompt: str
    answer: str
    """What the model learns to write after the prompt."""
    right: tuple[str, ...]
    """All right answers, as they are measured: names of choices, or texts."""
    choices: tuple[str, ...] = ()
    """The possible answers, as the model would write them; empty: it writes freely."""
    names: tuple[str, ...] = ()
    """What each choice stands for."""
    group: str = ""
    """Items of one group are one question to some measures."""


@dataclass(frozen=True)
class Task:
    """A task by name."""

    name: str
    items: Callable[[Fields], list[Item]]
    """The questions of a row; ``DataError`` if the row lacks what they need."""
    metrics: tuple[str, ...]
    """Names of ``metrics.METRICS``, the most telling first."""
    ranking: Ranking = "total"
    longest: int = 0
    """Most tokens of a written answer; 0: answers are choices."""
    stop: tuple[str, ...] = ()
    """A written answer ends before the first of these texts."""
    stand_in: Callable[[Fields], Fields] = lambda row: {}
    """Values that stand in for those of the answer, where a row is only asked; by default none: the row must have its
    answer."""

    def asked(self, row: Fields) -> list[Item]:
        """The questions of a row whose answer is not known; right answers mean nothing.

        Raises:
            DataError: the row lacks what they need.
        """
        return self.items({**row, **self.stand_in(row)})


def text_of(row: Fields, *path: str) -> str:
    """The text at this place of a row, without white space around it.

    Raises:
        DataError: there is no text.
    """
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"a row has no text in {'.'.join(path)!r}", remedy="fill the field, or drop the row")
    return value.strip()


def list_of(row: Fields, *path: str) -> list[Any]:
    """The list at this place of a row.

    Raises:
        DataError: there is none, or it is empty.
    """
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise DataError(f"a row has no list in {'.'.join(path)!r}", remedy="fill the field, or drop the row")
    return list(value)


def label_of(row: Fields, names: Sequence[str], field: str = "label") -> str:
    """The name of a row's class.

    Args:
        names: of the classes, in the order in which the data set numbers them.

    Raises:
        DataError: the label is neither one of the names nor the number of one.
    """
    label = row.get(field)
    if isinstance(label, str) and label.strip().lower() in names:
        return label.strip().lower()
    if isinstance(label, int) and 0 <= label < len(names):  # True and False are 1 and 0
        return names[label]
    raise DataError(
        f"a row's {field!r} is {label!r}, not one of {', '.join(names)}",
        remedy="rows without a label (a set's hidden test rows) cannot be learned or measured: use another split",
    )


def fixed_fields(**values: Any) -> Callable[[Fields], Fields]:
    """These values, whatever the row, for ``Task.stand_in``."""
    return lambda row: values


def choose(prompt: str, right: str, choices: Mapping[str, str], group: str = "") -> Item:
    """An item whose answer is one of these choices, by name."""
    return Item(prompt, choices[right], (right,), tuple(choices.values()), tuple(choices), group)
