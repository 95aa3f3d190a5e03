"""What attacks find, by kind: each kind has scores of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tokens:
    """The tokens of every sequence in the view, in its order."""

    ids: list[list[int]]
    response: bool = False
    """Only those of the answer are meant, at their places in the whole row."""


@dataclass(frozen=True)
class Labels:
    """The number of every sequence's choice, by several methods."""

    by: dict[str, list[int]]
    unnamed: frozenset[str] = frozenset()
    """Methods that group the sequences, but do not know which group is which choice."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Texts:
    """Texts behind an update, in any order and number, as tokens."""

    ids: list[list[int]]
    notes: tuple[str, ...] = ()
    """What stands in the attack's way."""


@dataclass(frozen=True)
class Scores:
    """Of every row asked about, by several methods: the higher the likelier it was trained on."""

    by: dict[str, list[float]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ranks:
    """Of every sequence in the view, numbers of the rows asked about, the likeliest first."""

    by_row: list[list[int]]


Found = Tokens | Labels | Texts | Scores | Ranks
