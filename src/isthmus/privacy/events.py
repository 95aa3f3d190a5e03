"""What left a silo, as immutable events: a mechanism describes itself, an accountant may then compose it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Path = Literal["forward", "gradient", "update"]
"""What kind of tensor left: hidden states, the loss gradient on its way down, or an adapter update."""


@dataclass(frozen=True, slots=True)
class Release:
    """One tensor that left a silo, once.

    ``noise`` is the standard deviation on each coordinate and ``clip`` the largest L2 norm of a row, both in the
    tensor's units; 0 means none. Without a clip no finite epsilon follows from the noise.
    """

    path: Path
    step: int
    rows: int
    width: int
    clip: float
    noise: float
    size: int
    """Payload in bytes."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
