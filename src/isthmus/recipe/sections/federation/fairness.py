"""``[federation.fairness]``: more weight for silos that do worse."""

from __future__ import annotations

from typing import Literal

from isthmus.recipe.section import Bound, Positive, Section


class FairnessSection(Section):
    """More weight for silos that do worse: a silo with a small loss lowers its own weight, with masks too;
    ``fairness = "tilted"`` sets kind."""

    main = "kind"

    kind: Literal["none", "q-ffl", "tilted", "agnostic"] = "none"
    """How the weight follows from the training loss. "q-ffl": its power, loss^strength (Li et al. 2020). "tilted":
    exp(strength · loss) (Li et al. 2021). "agnostic": the same of the sum over all rounds (Mohri et al. 2019);
    experimental: no recorded gain."""
    strength: Positive = 1.0
    """The power of "q-ffl", or the factor in the exponent of the others."""
    reference: Positive = 2.0
    """Training loss in nats: a silo with this loss or more at the start of a round keeps its full weight."""
    bound: Bound = 4.0
    """No silo divides its own weight by more than this."""
