"""Noise that the root adds to a round's sum before anybody else sees the mean.

The root, which sees the sum without it, is trusted then; what it publishes is not to tell of any silo. What it cost is
noted in a ledger of the root's own, before the round is on disk.

Shapes: K numbers that cross, S digits of a share.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from isthmus.federation.collection import Collected
from isthmus.privacy.discrete import discrete_gaussian
from isthmus.privacy.ledger import FileLedger
from isthmus.privacy.noise import SecretNoise
from isthmus.privacy.summed import sum_noise
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT
from isthmus.report.record import RoleDirectory


class CentralNoise:
    """Nothing happens where the recipe has silos noise the sum, or nobody.

    Args:
        store: the root's, for its ledger.
    """

    def __init__(self, recipe: Recipe, store: RoleDirectory) -> None:
        noise = sum_noise(recipe)
        self._noise = noise if noise is not None and noise.central else None
        if self._noise is not None:
            told = f"{recipe.federation.model_dump_json()} {recipe.privacy.model_dump_json()}"
            self._draws = SecretNoise()
            self._ledger = FileLedger(
                store.path / "ledger.jsonl",
                silo=ROOT,
                recipe=hashlib.sha256(told.encode()).hexdigest()[:32],
                begun=store.last_round() > 0,
            )

    def added(self, round: int, collected: Collected) -> Collected:
        """What was collected, with the noise in it."""
        if self._noise is None or collected.sums is None or collected.total_KS is None:
            return collected
        sums, total_KS = collected.sums, collected.total_KS.copy()
        levels, size, clip = sums.ring.levels, sums.projection.size, sums.ring.range
        share = self._noise.update(levels, size)
        total_KS[:size] += discrete_gaussian(self._draws, share.deviation, size)
        self._ledger.record(share.event("update", round, size, clip, clip / levels))
        if sums.tells:
            share = self._noise.norm(levels)
            total_KS[size] += discrete_gaussian(self._draws, share.deviation, 1)[0]
            self._ledger.record(share.event("norm", round, 1, clip, 1 / (2 * levels)))
        learned = sums.mean("all", total_KS)
        return replace(collected, contributions=(learned,) if learned else (), total_KS=total_KS)
