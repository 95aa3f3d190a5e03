"""What the trunk's features share with its units."""

from __future__ import annotations

from tests.unit.trunk.conftest import build, model

__all__ = ["build", "model"]
