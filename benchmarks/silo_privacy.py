"""Differential privacy of whole silos: what epsilon 8 costs, in sums of a hundred silos.

A part of ``make bench-federation``. The silos are Shakespeare's hundred most talkative speakers, stories260k, all in
every round; each clips its update and adds its share of the noise under masks, so that only the sum, with all of the
noise, is ever seen. Neighbours differ in one silo's updates, put in place of any others: the sensitivity of a sum is
twice the clip.
"""

from __future__ import annotations

import math

import dp_accounting
from dp_accounting import pld

from benchmarks.corpora import SPEAKING
from benchmarks.learning import merged
from benchmarks.results import Results
from benchmarks.tasks import Values
from benchmarks.trials import shipped, tried

SILOS, SEEDS = 100, (0, 1)
EPSILON, DELTA = 8.0, 1e-5
ROUNDS, CLIP = 6, 1.0
TRAIN = {"rounds": ROUNDS, "learning_rate": 2e-2}


def measure(results: Results) -> None:
    noise = deviation(ROUNDS)
    spent = epsilon(noise, ROUNDS)
    what = f"silo-level privacy, {SILOS} silos"
    results.add(f"{what}: epsilon at delta {DELTA:g}, by dp-accounting", spent, "nats", at_most=EPSILON + 1e-3)
    for name, update in ways(noise).items():
        trials = [tried(SPEAKING, sections(update), silos=SILOS, seed=seed) for seed in SEEDS]
        found = [100 * one.final.accuracy for one in trials]
        results.add(f"{what}, {name}: accuracy of the next token", sum(found) / len(found), "%")
        results.add(f"{what}, {name}: loss", sum(one.final.loss for one in trials) / len(trials), "nats")
        results.add(f"{what}, {name}: accuracy, range of {len(SEEDS)} seeds", max(found) - min(found), "points")


def ways(noise: float) -> dict[str, Values]:
    """What is done to each silo's update.

    Args:
        noise: of a sum, in sensitivities.
    """
    share = noise * 2 * CLIP / math.sqrt(SILOS)
    return {"no clip, no noise": {}, "epsilon 8": {"clip": CLIP, "noise": share}}


def sections(update: Values) -> Values:
    """The shipped recipe with this on updates."""
    values = merged(shipped("private-updates"), {"train": TRAIN})
    return {**values, "boundary": {**values["boundary"], "update": {"clip": 0.0, "noise": 0.0, **update}}}


def deviation(rounds: int) -> float:
    """Of the noise in one round's sum, in sensitivities, for which all rounds together have this epsilon."""
    return float(dp_accounting.get_sigma_gaussian(EPSILON, DELTA) * math.sqrt(rounds))


def epsilon(noise: float, rounds: int) -> float:
    """Of so many rounds with this noise, by their privacy loss distribution: another way than the noise was found."""
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp_accounting.GaussianDpEvent(noise), rounds)
    return float(accountant.get_epsilon(DELTA))
