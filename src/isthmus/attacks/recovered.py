"""The results of attacks, by kind. Each kind has its own scores (``audit.judge``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RecoveredTokens:
    """A guess at the tokens of every sequence in the view, in the view's order."""

    ids: list[list[int]]
    response: bool = False
    """Only the answer's tokens count, at their positions in the whole row; ``score.ABSENT`` elsewhere."""


@dataclass(frozen=True)
class LabelGuesses:
    """The guessed choice of every sequence in the view, by method."""

    by: dict[str, list[int]]
    """Index into the choices, or number of a cluster, per sequence."""
    clusters: frozenset[str] = frozenset()
    """Methods that give clusters: which cluster is which choice is unknown."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecoveredTexts:
    """Texts recovered from an update, as tokens, in any order and number."""

    ids: list[list[int]]
    notes: tuple[str, ...] = ()
    """Conditions under which the attack is not exact."""


@dataclass(frozen=True)
class MembershipScores:
    """A membership score for every candidate, by method; a higher score means more likely a training row."""

    by: dict[str, list[float]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CandidateRanks:
    """For every sequence in the view the indices of the likeliest candidates, the likeliest first."""

    by_row: list[list[int]]


@dataclass(frozen=True)
class AttributeGuesses:
    """For every sequence in the view whether its row has a token of a list before its last one, by method."""

    by: dict[str, list[bool]]
    tokens: frozenset[int]
    """The list."""
    notes: tuple[str, ...] = ()


Recovered = RecoveredTokens | LabelGuesses | RecoveredTexts | MembershipScores | CandidateRanks | AttributeGuesses
