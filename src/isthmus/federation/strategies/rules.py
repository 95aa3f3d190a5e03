"""Rules by which the changes of many become one: the mean, medians, clipping, trust in one of them.

Shapes: N contributions, P parameters, C some of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

COLUMNS = 1 << 16
"""Parameters that are copied to fp64 at a time."""
ROUNDING = 1e-12
"""By which sums of weights may miss a half."""
TINY = torch.finfo(torch.float64).tiny


class Rule(Protocol):
    """Turns N changes into one."""

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor, faults: int) -> torch.Tensor:
        """The change that stands for all, fp64, P.

        Args:
            changes_NP: fp32 or fp64, at least one; the trusted one first, where the recipe names one.
            weights_N: fp64, above 0, with the sum 1. Rules that count contributions take each for one.
            faults: how many are malicious at most; there are enough of the others for this rule.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The rule's state after earlier rounds; most have none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return


class Mean(Rule):
    """The weighted mean (FedAvg, McMahan et al. 2017). One malicious contribution makes anything of it."""

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor, faults: int = 0) -> torch.Tensor:
        return total(changes_NP, weights_N)


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
    """A part of the median distance: in the end smaller distances count as this, and a smaller step is the last."""

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
        return self._settled(changes_NP, weights_N, point_P)

    def _settled(self, changes_NP: torch.Tensor, weights_N: torch.Tensor, point_P: torch.Tensor) -> torch.Tensor:
        """The point, or the contribution nearest to it if that has the smaller sum: steps only creep up to one."""
        away_N = distances(changes_NP, point_P)
        nearest_P = changes_NP[away_N.argmin()].double()
        return nearest_P if weights_N @ distances(changes_NP, nearest_P) <= weights_N @ away_N else point_P


class NormBound(Rule):
    """Each change shortened to a multiple of the median norm, then the weighted mean (Sun et al. 2019).

    While N ≥ 2f + 1 no result is longer than the multiple of the longest honest change; its direction is not defended.
    """

    multiple = 1.0

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor, faults: int) -> torch.Tensor:
        origin_P = torch.zeros(changes_NP.shape[1], dtype=torch.float64)
        radius = self.multiple * float(distances(changes_NP, origin_P).quantile(0.5))
        return _pulled(origin_P, changes_NP, weights_N, radius)


class CenteredClipping(Rule):
    """The last round's result, pulled by each change as far as the median distance (Karimireddy et al. 2021).

    The paper proves it for up to a tenth of malicious contributions and a radius that follows from the honest
    variance. Nobody tells the root that, so it takes the median distance, which is an honest one's while N ≥ 2f + 1; a
    reference that is far off comes nearer by the factor 2f/N at each step.
    """

    steps = 5

    def __init__(self) -> None:
        self._reference_P: torch.Tensor | None = None

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor, faults: int) -> torch.Tensor:
        point_P = self._reference_P
        if point_P is None:
            point_P = torch.zeros(changes_NP.shape[1], dtype=torch.float64)
        for _ in range(self.steps):
            radius = float(distances(changes_NP, point_P).quantile(0.5))
            point_P = _pulled(point_P, changes_NP, weights_N, radius)
        self._reference_P = point_P
        return point_P

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self._reference_P}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reference_P = state.get("reference")


class FLTrust(Rule):
    """The mean of all changes at the trusted one's length, weighed by the cosine of their angles to it, those that are
    negative left out (FLTrust, Cao et al. 2021).

    In the paper the root trains on a few rows of its own; here it is whoever the recipe trusts, a silo that the root's
    operator runs, say, and its change counts, too. Any number of the others may be malicious: the result is never
    longer than the trusted change, and never points away from it.
    """

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor, faults: int) -> torch.Tensor:
        trusted_P = changes_NP[0].double()
        length = trusted_P.norm()
        norms_N = torch.stack([change_P.double().norm() for change_P in changes_NP]).clamp_min(TINY)
        products_N = torch.stack([change_P.double() @ trusted_P for change_P in changes_NP])
        trust_N = (products_N / norms_N / length.clamp_min(TINY)).clamp_min(0)
        if not trust_N.any():  # the trusted change is zero, and so is all that is as long
            return trusted_P
        return total(changes_NP, trust_N / trust_N.sum() * (length / norms_N))


def total(changes_NP: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """The weighted sum, fp64, P."""
    total_P = torch.zeros(changes_NP.shape[1], dtype=torch.float64)
    for weight, change_P in zip(weights_N.tolist(), changes_NP, strict=True):  # one row at a time in fp64
        total_P.add_(change_P, alpha=weight)
    return total_P


def distances(changes_NP: torch.Tensor, point_P: torch.Tensor) -> torch.Tensor:
    """The distance of each change from a point, fp64, N."""
    return torch.stack([(change_P - point_P).norm() for change_P in changes_NP])


def by_columns(changes_NP: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A function of each parameter's N values, applied to all parameters in pieces that fit memory in fp64: P."""
    return torch.cat([reduce(piece_NC.double()) for piece_NC in torch.split(changes_NP, COLUMNS, dim=1)])


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


def _pulled(point_P: torch.Tensor, changes_NP: torch.Tensor, weights_N: torch.Tensor, radius: float) -> torch.Tensor:
    """The point after each change has pulled with its weight, from no farther than the radius."""
    away_N = distances(changes_NP, point_P)
    pull_N = weights_N * (radius / away_N.clamp_min(TINY)).clamp_max(1)
    pulled_P = point_P.clone()
    for pull, change_P in zip(pull_N.tolist(), changes_NP, strict=True):
        pulled_P.add_(change_P - point_P, alpha=pull)
    return pulled_P
