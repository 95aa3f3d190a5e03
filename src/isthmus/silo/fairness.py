"""Fairness: a silo with a low loss makes its own weight smaller, so that silos with a high loss count for more.

A silo knows its own loss alone and need not reveal it: the factor of its weight follows from its loss and a reference
that the recipe gives to all. In logarithms, with q, t, γ the recipe's strength:

- *q-ffl* (Li et al. 2020): q·ln(loss / reference), the power of the loss;
- *tilted* (TERM, Li et al. 2021): t·(loss - reference), its exponential;
- *agnostic* (AFL, Mohri et al. 2019): γ·Σ(loss - reference) over the rounds so far, the multiplicative weights with
  which a mixture of silos moves towards its worst.

Each is held within [1/bound, 1], agnostic's sum in every round: a weight in a masked sum stays one, and so much at most
is one silo's influence changed. The papers divide by the sum over all silos, which the mean at the root does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from isthmus.recipe import FairnessSection

FIRST = 3
"""The first steps of a round, whose mean loss counts: one step has few rows, later ones have learned already."""
SMALLEST = 1e-12
"""The smallest loss, for its logarithm."""


def starting_loss(losses: Sequence[float | None]) -> float | None:
    """The training loss at a round's start, from its steps' losses: the mean of the first in which rows took part."""
    known = [loss for loss in losses if loss is not None][:FIRST]
    return sum(known) / len(known) if known else None


def factor(section: FairnessSection, loss: float | None, before: float = 1.0) -> float:
    """The factor of a silo's weight, from 1/bound to 1.

    Args:
        loss: at the round's start; None: no row took part, and nothing has changed.
        before: the factor of the silo's last round, from which ``agnostic`` goes on.
    """
    if section.kind == "none" or loss is None:
        return before
    if section.kind == "q-ffl":
        log = section.strength * math.log(max(loss, SMALLEST) / section.reference)
    else:
        log = section.strength * (loss - section.reference)
    if section.kind == "agnostic":
        log += math.log(before)
    return min(1.0, max(1 / section.bound, math.exp(min(0.0, log))))
