"""What the silo's features share with its units."""

from __future__ import annotations

from tests.unit.silo.conftest import once_model, start

__all__ = ["once_model", "start"]
