"""Fairness: a silo that does well makes its own weight smaller, so that those who do badly are heard.

A silo knows its own loss and no other's, and nobody need learn it: what it multiplies its weight by follows from its
loss against a reference that the recipe gives to all. In logarithms, with q, t, γ the recipe's strength:

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
"""Steps of a round whose mean loss counts: the first alone is of few rows, later ones tell what the silo has learned by
itself since."""
LEAST = 1e-12


def starting_loss(losses: Sequence[float | None]) -> float | None:
    """The training loss at a round's start, from its steps' losses: the mean of the first in which rows took part."""
    known = [loss for loss in losses if loss is not None][:FIRST]
    return sum(known) / len(known) if known else None


def factor(section: FairnessSection, loss: float | None, before: float = 1.0) -> float:
    """What a silo multiplies its weight by, from 1/bound to 1.

    Args:
        loss: at the round's start; None: no row took part, and nothing has changed.
        before: the factor of the silo's last round, from which ``agnostic`` goes on.
    """
    if section.kind == "none" or loss is None:
        return before
    if section.kind == "q-ffl":
        log = section.strength * math.log(max(loss, LEAST) / section.reference)
    else:
        log = section.strength * (loss - section.reference)
    if section.kind == "agnostic":
        log += math.log(before)
    return min(1.0, max(1 / section.bound, math.exp(min(0.0, log))))
