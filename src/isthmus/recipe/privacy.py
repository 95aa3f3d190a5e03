"""The recipe's sections on privacy."""

from __future__ import annotations

from isthmus.recipe.section import Amount, Section


class ReleaseSection(Section):
    """How one kind of tensor is secured before it leaves a silo."""

    clip: Amount = 0.0
    """Largest L2 norm of one row (one token; for an update, the whole update). 0: not clipped."""
    noise: Amount = 0.0
    """Standard deviation of the Gaussian noise on every coordinate, in the tensor's own units."""
