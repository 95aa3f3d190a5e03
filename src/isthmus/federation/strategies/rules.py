"""Rules by which the changes of many become one. The mean believes everybody.

Shapes: N contributions, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

COLUMNS = 1 << 16
"""Parameters that are copied to fp64 at a time."""


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
        """What it remembers of earlier rounds."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return


class Mean(Rule):
    """The weighted mean (FedAvg, McMahan et al. 2017). One malicious contribution makes anything of it."""

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor, faults: int = 0) -> torch.Tensor:
        return total(changes_NP, weights_N)


def total(changes_NP: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """The weighted sum, fp64, P."""
    total_P = torch.zeros(changes_NP.shape[1], dtype=torch.float64)
    for weight, change_P in zip(weights_N.tolist(), changes_NP, strict=True):  # one row at a time in fp64
        total_P.add_(change_P, alpha=weight)
    return total_P


def distances(changes_NP: torch.Tensor, point_P: torch.Tensor) -> torch.Tensor:
    """How far each change is from a point, fp64, N."""
    return torch.stack([(change_P - point_P).norm() for change_P in changes_NP])


def by_columns(changes_NP: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What a function of each parameter's N values makes of all parameters, in pieces that fit memory in fp64: P."""
    return torch.cat([reduce(piece_NC.double()) for piece_NC in torch.split(changes_NP, COLUMNS, dim=1)])
