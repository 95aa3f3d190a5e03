"""A process's place among those that torchrun started. Nothing here imports torch: every command asks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from isthmus.engines.lifetime import by_engine
from isthmus.errors import NotSupportedError, RecipeError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets in the environment of each process."""


@dataclass(frozen=True)
class RankPlace:
    """This process's place.

    Args:
        local: its number on this machine.
    """

    rank: int
    ranks: int
    local: int

    @classmethod
    def find(cls, environment: Mapping[str, str] = os.environ) -> Self | None:
        """The place by torchrun's variables; None: it is one process alone, or an engine started it.

        Raises:
            RecipeError: they are not the numbers that torchrun sets.
        """
        if by_engine() or not all(name in environment for name in VARIABLES):
            return None
        try:
            place = cls(*(int(environment[name]) for name in VARIABLES[:3]))
        except ValueError as error:
            raise RecipeError(
                f"RANK, WORLD_SIZE or LOCAL_RANK in the environment is no number: {error}",
                remedy="unset them, or start the trunk by torchrun, which sets them",
            ) from error
        return place if place.ranks > 1 else None


def refuse_ranks(command: str) -> None:
    """Refuse a command that torchrun started several times over, and that is not for it.

    Raises:
        NotSupportedError: it did.
    """
    place = RankPlace.find()
    if place is not None:
        raise NotSupportedError(
            f"torchrun started 'isthmus {command}' {place.ranks} times; it is for the trunk alone",
            remedy=f"start 'isthmus {command}' without torchrun (or unset RANK and WORLD_SIZE)",
        )
