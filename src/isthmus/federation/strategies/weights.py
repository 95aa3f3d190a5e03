"""Weights that the root computes itself, from the updates or from their quality: each contribution's part of a round.

A silo's share of the change is what its clip is multiplied by: at most 1 by ``examples``, since a silo claims its own
tokens; at most bound/N by what the root computes from updates or from their reported quality; and by ``equal`` at most
fairness.bound/N, 1/N where no silo makes itself lighter.

Shapes: N contributions, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from isthmus.federation.contribution import Contribution
from isthmus.recipe import WeightsSection

FLOOR = 0.1
"""Nobody's score is below this part of a full one: who has rare rows weighs little beside the others, not nothing."""


class History:
    """The silos' participation in the rounds so far."""

    def __init__(self) -> None:
        self._rounds = 0
        self._joined: dict[str, int] = {}

    def participation(self, name: str) -> float:
        """The part of the rounds that this silo took part in, the one under way counted: above 0, at most 1."""
        return (self._joined.get(name, 0) + 1) / (self._rounds + 1)

    def note(self, names: Iterable[str]) -> None:
        """A round of these is over."""
        self._rounds += 1
        for name in names:
            self._joined[name] = self._joined.get(name, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self._rounds, "joined": dict(self._joined)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rounds, self._joined = state.get("rounds", 0), dict(state.get("joined", {}))


def shares(
    section: WeightsSection, contributions: Sequence[Contribution], changes_NP: torch.Tensor, history: History | None
) -> torch.Tensor:
    """Each contribution's share of the round's change, fp64, N, with the sum 1.

    Args:
        section: of a kind that the root computes.
        history: the silos' part in earlier rounds; needed for the kind ``quality``.
    """
    if section.kind == "agreement":
        scores_N = agreement(changes_NP)
    elif section.kind == "inverse-variance":
        scores_N = steadiness(changes_NP)
    else:
        assert history is not None
        scores_N = merit(contributions, history)
    return bounded(scores_N, section.bound)


def agreement(changes_NP: torch.Tensor) -> torch.Tensor:
    """The cosine of each change with the mean of the others, from ``FLOOR`` to 1; 1 for one that is alone.

    It finds outliers among many: of three silos, one can cancel another in the third's mean.
    """
    if len(changes_NP) == 1:
        return torch.ones(1, dtype=torch.float64)
    total_P = changes_NP.sum(dim=0, dtype=torch.float64)
    rows = (change_P.double() for change_P in changes_NP)  # one row at a time in fp64
    cosines = [torch.cosine_similarity(row_P, total_P - row_P, dim=0, eps=1e-30) for row_P in rows]
    return torch.stack(cosines).clamp(FLOOR, 1.0)


def steadiness(changes_NP: torch.Tensor) -> torch.Tensor:
    """One over each change's variance around the mean of all, in units of the least; ``FLOOR`` to 1.

    No silo declares the variance of its noise, so it is estimated: by the change's mean squared distance. Where silos
    have equally much to say, that orders them as their noise does.
    """
    mean_P = changes_NP.mean(dim=0, dtype=torch.float64)
    variances_N = torch.stack([(change_P.double() - mean_P).square().mean() for change_P in changes_NP])
    if not variances_N.any():
        return torch.ones_like(variances_N)
    return (variances_N.min() / variances_N).nan_to_num(1.0).clamp(FLOOR, 1.0)


def merit(contributions: Sequence[Contribution], history: History) -> torch.Tensor:
    """Reported quality, 0 to 1, times the part of the rounds that the silo took part in; ``FLOOR`` to 1."""
    merits = [one.quality * history.participation(one.name) for one in contributions]
    return torch.tensor(merits, dtype=torch.float64).clamp(FLOOR, 1.0)


def bounded(scores_N: torch.Tensor, bound: float) -> torch.Tensor:
    """Shares in proportion to these scores, above 0, but none above bound/N: what is beyond, the others share."""
    most = bound / len(scores_N)
    capped_N = torch.zeros(len(scores_N), dtype=torch.bool)
    while True:
        rest_N = scores_N.masked_fill(capped_N, 0.0)
        shares_N = rest_N / rest_N.sum() * (1 - most * int(capped_N.sum()))
        shares_N[capped_N] = most
        over_N = shares_N > most
        if not over_N.any() or (capped_N | over_N).all():  # all over by a rounding: they are equal
            return shares_N
        capped_N |= over_N
