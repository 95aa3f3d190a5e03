"""``[federation.noise]``: noise of a round's sum."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from isthmus.recipe.section import Positive, Section


class NoiseSection(Section):
    """Noise of a round's sum of updates, for the privacy of whole silos; needs federation.clip and equal weights. Left
    out: updates have the noise of boundary.update and no more."""

    where: Literal["silos", "root"] = "silos"
    """"silos": each silo adds a share of the noise, so that nobody sees a sum with less; needs masks. "root": the root
    adds all of it before anybody else sees the mean, and is trusted with what it sees itself."""
    multiplier: Positive | None = Field(default=None, examples=[1.0])
    """Standard deviation of the noise in each round's sum, as a multiple of the clip. Set this or epsilon."""
    epsilon: Positive | None = Field(default=None, examples=[8.0])
    """Epsilon of all train.rounds together, at privacy.delta; the noise follows from it. A round that is repeated costs
    more. Set this or multiplier."""
    colluding: Annotated[int, Field(ge=0)] = 0
    """How many silos may reveal their noise to the root or an edge; the noise of the others is enough without theirs.
    Only with where = "silos"."""

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if (self.multiplier is None) == (self.epsilon is None):
            raise ValueError("multiplier: the size of the noise is given once; set either multiplier or epsilon")
        if self.where == "root" and self.colluding:
            raise ValueError("colluding: the root alone draws the noise; leave colluding out")
        return self
