"""Central differential privacy: noise that the root adds to a round's sum before it publishes the mean.

The root sees the sum, or the updates, without noise and is trusted with them; the adapters that it publishes are
protected. Their charge is written to a ledger of the root's own before the round is on disk. The root clips open
updates, and rounds them as silos do under masks, so that both kinds of sum have the same noise in whole numbers.

Shapes: P parameters, K numbers that cross, S digits of a share.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from isthmus.federation.collection import Collected
from isthmus.federation.contribution import Contribution
from isthmus.privacy.discrete import discrete_gaussian
from isthmus.privacy.distributed_gaussian import SumNoise, sum_noise
from isthmus.privacy.ledger import FileLedger
from isthmus.privacy.noise import SecretNoise
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RoleDirectory
from isthmus.updates.compression import Compression
from isthmus.updates.flat import Layout
from isthmus.updates.quantize import Ring, shortened
from isthmus.updates.sums import SumFormat


class CentralNoise:
    """The noise of one federation's sums, and the ledger of what it cost.

    Args:
        noise: how much of it, by the recipe.
        store: the root's directory, for its ledger.

    Raises:
        LedgerError: rounds were published, but the ledger is gone or damaged.
    """

    def __init__(self, noise: SumNoise, recipe: Recipe, store: RoleDirectory) -> None:
        self._noise = noise
        lines = read_journal(store.path / "metrics.jsonl")
        sections = f"{recipe.federation.model_dump_json()} {recipe.privacy.model_dump_json()}"
        self._compression = Compression.of(recipe)
        self._draws = SecretNoise()
        self._ledger = FileLedger(
            store.path / "ledger.jsonl",
            silo=ROOT,
            recipe=hashlib.sha256(sections.encode()).hexdigest()[:32],
            begun=any(any(line["weights"].values()) for line in lines),
        )

    def added(self, round: int, collected: Collected, clip: float) -> Collected:
        """The collected updates as one noised mean; of nobody's, nothing is published and nothing charged.

        Args:
            clip: largest L2 norm of an update in this round.
        """
        if not collected.contributions:
            return collected
        if collected.total_KS is None:
            collected = self._summed(collected, clip)
        assert collected.sums is not None
        assert collected.total_KS is not None
        sums, total_KS = collected.sums, collected.total_KS.copy()
        levels, size = sums.ring.levels, sums.count
        share = self._noise.update(levels, size)
        total_KS[:size] += discrete_gaussian(self._draws, share.deviation, size)
        self._ledger.record(share.event("update", round, size, clip, clip / levels))
        if sums.indicators:
            share = self._noise.norm(levels)
            total_KS[size] += discrete_gaussian(self._draws, share.deviation, 1)[0]
            self._ledger.record(share.event("norm", round, 1, clip, 0.5 / levels))
        mean = sums.mean(total_KS)
        contributions = () if mean is None else (Contribution("all", *mean),)
        return replace(collected, contributions=contributions, total_KS=total_KS)

    def _summed(self, collected: Collected, clip: float) -> Collected:
        """Open updates, clipped and summed as whole numbers; all count alike, whatever weights they claim."""
        learned = collected.contributions
        layout = Layout.of(learned[0].change)
        sums = SumFormat(layout, Ring(len(learned), clip), indicators=self._compression.indicators)
        bound = self._noise.update(sums.ring.levels, layout.size).bound
        total_KS = np.zeros(sums.size, np.int64)
        for one in learned:
            short_P, within = shortened(layout.row(one.change), clip)
            whole = [sums.ring.encode_short(short_P, bound), sums.ring.side(within)[: sums.indicators]]
            total_KS += np.concatenate([*whole, sums.ring.encode_share(1.0)])
        return replace(collected, total_KS=total_KS, sums=sums)


def central_noise(recipe: Recipe, store: RoleDirectory) -> CentralNoise | None:
    """The root's noise; None: the recipe has the silos noise the sum, or nobody."""
    noise = sum_noise(recipe)
    return CentralNoise(noise, recipe, store) if noise is not None and noise.central else None
