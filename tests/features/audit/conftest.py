"""The attacked federation of the attacks' own tests."""

from tests.unit.attacks.conftest import attacked, attacked_model, two_silos

__all__ = ["attacked", "attacked_model", "two_silos"]
