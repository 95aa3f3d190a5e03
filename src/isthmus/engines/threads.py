"""How the processes of one machine share its cores."""

from __future__ import annotations

import os

from isthmus.recipe import Recipe

SPINS = "30000"


def share_cores() -> None:
    """Have OpenMP's idle threads sleep after a tenth of the default's spins, unless the environment says otherwise.

    Silo and trunk take turns: what one's threads spin, the other computes that much slower. Call it before torch is
    imported; processes started later inherit it.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def set_threads(recipe: Recipe) -> None:
    """Give torch the recipe's number of threads."""
    import torch

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
