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
        attempt: how often torchrun has started all ranks anew; 0 where they are on several machines, whose torchruns
            count differently.
    """

    rank: int
    ranks: int
    local: int
    attempt: int = 0

    @classmethod
    def find(cls, environment: Mapping[str, str] = os.environ) -> Self | None:
        """The place by torchrun's variables; None: it is one process alone, or an engine started it.

        Raises:
            RecipeError: they are not the numbers that torchrun sets.
        """
        if by_engine() or not all(name in environment for name in VARIABLES):
            return None
        try:
            rank, ranks, local = (int(environment[name]) for name in VARIABLES[:3])
            together = environment.get("LOCAL_WORLD_SIZE") == str(ranks)
            attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)) if together else 0
        except ValueError as error:
            raise RecipeError(
                f"torchrun's variables in the environment (RANK, WORLD_SIZE, LOCAL_RANK) are no numbers: {error}",
                remedy="unset them, or start the trunk by torchrun",
            ) from error
        return cls(rank, ranks, local, attempt) if ranks > 1 else None


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
