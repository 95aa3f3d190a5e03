"""Rules by which the changes of many become one. The mean believes everybody.

Shapes: N contributions, P parameters.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Rule(Protocol):
    """Turns N changes into one."""

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
        """The change that stands for all, fp64, P.

        Args:
            changes_NP: fp32, at least one.
            weights_N: fp64, above 0, with the sum 1.
        """
        ...


class Mean:
    """The weighted mean (FedAvg, McMahan et al. 2017)."""

    def combine(self, changes_NP: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
        total_P = torch.zeros(changes_NP.shape[1], dtype=torch.float64)
        for weight, change_P in zip(weights_N.tolist(), changes_NP, strict=True):  # one row at a time in fp64
            total_P.add_(change_P, alpha=weight)
        return total_P
