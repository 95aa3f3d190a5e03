"""Rules that believe changes which have others near them. They count contributions and weigh none.

Shapes: N contributions, P parameters, C some of them.
"""

from __future__ import annotations

from typing import Any

import torch

from isthmus.federation.strategies.rules import COLUMNS, Rule, by_columns, weighted_median


class Krum(Rule):
    """The change whose N - f - 2 nearest others are nearest (Blanchard et al. 2017); N > 2f + 2."""

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor, faults: int) -> torch.Tensor:
        return changes_NP[_remoteness(_squares(changes_NP), faults).argmin()].double()


class MultiKrum(Rule):
    """The mean of the N - f changes that Krum likes best (Blanchard et al. 2017); N > 2f + 2."""

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor, faults: int) -> torch.Tensor:
        best = _remoteness(_squares(changes_NP), faults).argsort(stable=True)[: len(changes_NP) - faults]
        return by_columns(changes_NP[best], lambda values_NC: values_NC.mean(dim=0))


class Bulyan(Rule):
    """Krum's choice, again and again, until N - 2f are chosen; of each parameter the mean of the N - 4f values nearest
    to their median (El Mhamdi et al. 2018). N ≥ 4f + 3.
    """

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor, faults: int) -> torch.Tensor:
        chosen = self._choose(_squares(changes_NP), faults)
        kept = len(chosen) - 2 * faults
        return by_columns(changes_NP[chosen], lambda values_NC: _mean_of_middle(values_NC, kept))

    def _choose(self, squares_NN: torch.Tensor, faults: int) -> list[int]:
        left, chosen = list(range(len(squares_NN))), list[int]()
        while len(chosen) < len(squares_NN) - 2 * faults:
            best = int(_remoteness(squares_NN[left][:, left], faults).argmin())
            chosen.append(left.pop(best))
        return chosen


class Mixed(Rule):
    """A rule over means: each change gives way to the mean of its N - f nearest, itself among them (nearest-neighbour
    mixing, Allouah et al. 2023). N ≥ 2f + 1, and what the rule needs.

    Silos with unlike data become more alike, so that what is left between them is what the rule can judge by.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor, faults: int) -> torch.Tensor:
        count = len(changes_NP) - faults
        nearest_NK = _squares(changes_NP).argsort(dim=1, stable=True)[:, :count]
        shares_NN = torch.zeros(len(changes_NP), len(changes_NP), dtype=torch.float64)
        shares_NN.scatter_(1, nearest_NK, 1 / count)
        return self._rule.combine(shares_NN @ changes_NP.double(), weights_N, faults)

    def state_dict(self) -> dict[str, Any]:
        return self._rule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rule.load_state_dict(state)


def _squares(changes_NP: torch.Tensor) -> torch.Tensor:
    """Squared distances, fp64, N × N. From differences: products of large changes would leave rounding errors alone."""
    squares_NN = torch.zeros(len(changes_NP), len(changes_NP), dtype=torch.float64)
    for piece_NC in torch.split(changes_NP, COLUMNS, dim=1):
        piece_NC = piece_NC.double()
        squares_NN += torch.cdist(piece_NC, piece_NC, compute_mode="donot_use_mm_for_euclid_dist").square()
    return squares_NN


def _remoteness(squares_NN: torch.Tensor, faults: int) -> torch.Tensor:
    """Krum's score: for each the sum of its N - f - 2 smallest squared distances to others.

    Two at least (Bulyan's last choices have fewer): by one, the nearest two would always tie.
    """
    neighbours = max(2, len(squares_NN) - faults - 2)
    return squares_NN.sort(dim=1).values[:, 1 : neighbours + 1].sum(dim=1)  # the first is its distance to itself


def _mean_of_middle(values_NC: torch.Tensor, count: int) -> torch.Tensor:
    """The mean of so many values nearest to the median, column by column."""
    equal_N = torch.full((len(values_NC),), 1 / len(values_NC), dtype=torch.float64)
    sorted_NC = values_NC.sort(dim=0).values  # so that of two that are equally far it is always the lower
    order_NC = (sorted_NC - weighted_median(sorted_NC, equal_N)).abs().argsort(dim=0, stable=True)
    return sorted_NC.gather(0, order_NC[:count]).mean(dim=0)
