"""``[privacy]``: the budgets."""

from __future__ import annotations

from pydantic import Field

from isthmus.recipe.section import Chance, Positive, Section


class PrivacySection(Section):
    """How much may leave a silo about one record, and about the silo, in all rounds together."""

    delta: Chance = 1e-5
    """The delta at which every epsilon is stated. Choose it well below one over the number of records."""
    record_epsilon: Positive | None = Field(default=None, examples=[50.0])
    """Largest epsilon of one record's hidden states and gradients, all composed. A record whose budget is used up is
    skipped in training; a prompt whose budget is used up is refused. Left out: no limit."""
    silo_epsilon: Positive | None = Field(default=None, examples=[500.0])
    """Largest epsilon of everything that leaves a silo, updates included, composed as if all of it were about one
    record. Left out: no limit."""
