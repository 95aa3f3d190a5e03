"""Rules that look for the middle: of each parameter by itself, or of all together.

Shapes: N contributions, P parameters, C some of them.
"""

from __future__ import annotations

import torch

from isthmus.federation.strategies.rules import Rule, by_columns, distances, total

ROUNDING = 1e-12
"""By which sums of weights may miss a half."""


class Median(Rule):
    """The weighted median of each parameter (Yin et al. 2018): between honest values while N ≥ 2f + 1 weigh alike."""

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor, faults: int) -> torch.Tensor:
        return by_columns(changes_NP, lambda values_NC: weighted_median(values_NC, weights_N))


class TrimmedMean(Rule):
    """The mean of each parameter without its f lowest and f highest values (Yin et al. 2018); N ≥ 2f + 1."""

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor, faults: int) -> torch.Tensor:
        kept = slice(faults, len(changes_NP) - faults)
        return by_columns(changes_NP, lambda values_NC: values_NC.sort(dim=0).values[kept].mean(dim=0))


class GeometricMedian(Rule):
    """The point with the least weighted sum of distances, by smoothed Weiszfeld steps (RFA, Pillutla et al. 2022).

    While N ≥ 2f + 1 weigh alike it is no farther from any point than 2(N - f)/(N - 2f) times the honest changes are.
    The steps begin at the median of each parameter: from the mean, which anybody can carry off, the way back is long.
    What counts as a small distance shrinks from step to step: steps that begin at a contribution would never leave it.
    """

    steps = 200
    smoothing = 1e-6
    """Of the median distance: in the end distances below count as this, and a step below it is the last."""

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor, faults: int) -> torch.Tensor:
        point_P = Median().combine(changes_NP, weights_N, faults)
        least = float(weighted_median(distances(changes_NP, point_P)[:, None], weights_N))
        finest = self.smoothing * least
        for _ in range(self.steps if least else 0):  # 0: half the weight lies in the point, so it is the one
            pull_N = weights_N / distances(changes_NP, point_P).clamp_min(least)
            before_P, point_P = point_P, total(changes_NP, pull_N / pull_N.sum())
            if least == finest and (point_P - before_P).norm() < finest:
                break
            least = max(least / 2, finest)
        return point_P


def weighted_median(values_NC: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """The middle of all points with half the weight on either side, fp64, C.

    Args:
        values_NC: fp64.
        weights_N: with the sum 1.
    """
    sorted_NC, order_NC = values_NC.sort(dim=0)
    below_NC = weights_N[order_NC].cumsum(dim=0)
    low_1C, high_1C = (
        (below_NC < 0.5 + slack).sum(dim=0, keepdim=True).clamp_max(len(values_NC) - 1)
        for slack in (-ROUNDING, ROUNDING)
    )
    return ((sorted_NC.gather(0, low_1C) + sorted_NC.gather(0, high_1C)) / 2)[0]
