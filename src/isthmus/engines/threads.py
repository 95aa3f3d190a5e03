"""Threads of the processes that share one machine's cores."""

from __future__ import annotations

import os

from isthmus.recipe import Recipe

SPINS = "30000"
"""Busy-wait iterations of an idle OpenMP thread before it sleeps: a tenth of libgomp's default."""


def share_cores() -> None:
    """Set ``GOMP_SPINCOUNT`` to ``SPINS`` unless the environment sets it.

    Silo and trunk take turns, so threads that busy-wait in one slow down the other. Call this before torch is
    imported. Child processes inherit the setting.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def set_threads(recipe: Recipe) -> None:
    """Set torch's number of threads to the recipe's ``threads``, if it is given."""
    import torch

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
