"""Rules that let every change pull, and none pull harder than most do.

Shapes: N contributions, P parameters.
"""

from __future__ import annotations

from typing import Any

import torch

from isthmus.federation.strategies.rules import Rule, distances


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


def _pulled(point_P: torch.Tensor, changes_NP: torch.Tensor, weights_N: torch.Tensor, radius: float) -> torch.Tensor:
    """The point after each change has pulled with its weight, from no farther than the radius."""
    away_N = distances(changes_NP, point_P)
    pull_N = weights_N * (radius / away_N.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1)
    pulled_P = point_P.clone()
    for pull, change_P in zip(pull_N.tolist(), changes_NP, strict=True):
        pulled_P.add_(change_P - point_P, alpha=pull)
    return pulled_P
