"""Differential privacy of whole silos: what epsilon 8 costs, in sums of a hundred silos.

A part of ``make bench-federation``. The silos are Shakespeare's hundred most talkative speakers, stories260k, all in
every round; each clips its update and adds its share of the noise under masks, so that only the sum, with all of the
noise, is ever seen. Neighbours differ in one silo's updates, put in place of any others: the sensitivity of a sum is
twice the clip.
"""

from __future__ import annotations

from collections.abc import Sequence

import dp_accounting
from dp_accounting import pld

from benchmarks.common.results import Results
from benchmarks.common.rows import Values
from benchmarks.federated.corpora import SPEAKING
from benchmarks.federated.evaluation import pooled
from benchmarks.federated.simulation import merged
from benchmarks.federated.trials import shipped, tried
from isthmus.privacy.accountant import Accountant
from isthmus.privacy.events import Release

SILOS, SEEDS = 100, (0, 1)
EPSILON, DELTA = 8.0, 1e-5
TRAIN = {"learning_rate": 2e-2}
SLACK = 1e-3
"""Of epsilon: rounding."""


def measure(results: Results) -> None:
    what = f"silo-level privacy, {SILOS} silos"
    for name, sections in ways().items():
        trials = [
            tried(SPEAKING, sections, silos=SILOS, seed=seed, every=sections["train"]["rounds"]) for seed in SEEDS
        ]
        found = [100 * one.final.accuracy for one in trials]
        results.add(f"{what}, {name}: accuracy of the next token", sum(found) / len(found), "%")
        results.add(f"{what}, {name}: loss", sum(one.final.loss for one in trials) / len(trials), "nats")
        results.add(f"{what}, {name}: accuracy, range of {len(SEEDS)} seeds", max(found) - min(found), "points")
    untrained = pooled(trials[-1].scores[0].values())
    results.add(f"{what}: accuracy of the next token before training", 100 * untrained.accuracy, "%")
    results.add(f"{what}: loss before training", untrained.loss, "nats")
    updates = trials[-1].updates
    accountant = Accountant(DELTA, updates)
    results.add(f"{what}: epsilon by the ledger", accountant.updates.epsilon(DELTA).value, "", at_most=EPSILON + SLACK)
    results.add(f"{what}: epsilon by dp-accounting", epsilon(updates), "", at_most=EPSILON + SLACK)


def ways() -> dict[str, Values]:
    """The shipped recipe without clip and noise, and as it is."""
    private = merged(shipped("private-updates"), {"train": TRAIN})
    federation = {key: value for key, value in private["federation"].items() if key not in ("noise", "clip")}
    return {"no clip, no noise": {**private, "federation": federation}, "epsilon 8": private}


def epsilon(updates: Sequence[Release]) -> float:
    """Of what a ledger says was clipped and how it was noised, by Gaussian privacy loss distributions: nothing of how
    the noise was found, or of how the ledger charges it, is in it."""
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    for one in updates:
        accountant.compose(dp_accounting.GaussianDpEvent(one.noise / (2 * one.clip)))
    return float(accountant.get_epsilon(DELTA))
