"""What a service says of itself to whoever watches over its process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Vitals:
    """The state of a service at one moment."""

    state: str
    """A word for what it does, as ``training``."""
    completed: int
    """Number of rounds that it has finished and saved."""
    failure: str = ""
    """Why it can serve nobody until it is started again; empty if it can."""
    missing: tuple[str, ...] = ()
    """Names of the parties that it waits for."""
    gauges: Mapping[str, float] = field(default_factory=dict)
    """Further numbers, by a name with its unit, as ``session_bytes``."""


@runtime_checkable
class Watched(Protocol):
    """A service that says how it is."""

    def vitals(self) -> Vitals:
        """Its state now. Waits for no lock that a long computation holds."""
        ...
