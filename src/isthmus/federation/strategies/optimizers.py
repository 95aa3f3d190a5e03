"""Server optimizers: the round's change as a step.

Shapes: P parameters.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class ServerOptimizer(Protocol):
    """Takes each round's change for a gradient, with the sign reversed."""

    def step(self, change_P: torch.Tensor) -> torch.Tensor:
        """What to add to the shared parameters, fp64, P.

        Args:
            change_P: the round's combined change, fp64.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What it remembers of earlier rounds."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Plain:
    """The change itself (FedAvg)."""

    def step(self, change_P: torch.Tensor) -> torch.Tensor:
        return change_P

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
