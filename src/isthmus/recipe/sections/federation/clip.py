"""``[federation.clip]``: the clip of updates that noise in sums is measured by."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from isthmus.recipe.section import Chance, Positive, Section

SHORTEST, LONGEST = 1e-12, 1e12
"""Bounds of a clip: between them, its quantization steps are still numbers of 32 bits."""


class ClipSection(Section):
    """The largest L2 norm of a silo's update, with federation.noise; takes the place of federation.secure.range."""

    norm: Annotated[float, Field(ge=SHORTEST, le=LONGEST, examples=[0.5])]
    """Largest L2 norm of the numbers of an update that cross; with quantile, that of the first round."""
    quantile: Chance | None = Field(default=None, examples=[0.5])
    """Share of the updates that the clip should leave unchanged: it adapts from round to round (Andrew et al. 2021).
    Left out: the clip stays as it is. Experimental: no recorded gain over a fixed clip."""
    rate: Positive = 0.2
    """How fast the clip adapts: by a factor of at most exp(rate) each round; only with quantile."""
    norms: Chance = 0.1
    """Share of a round's privacy that is spent on whether the clip changed each silo's update; only with quantile."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        fields = ClipSection.model_fields
        for name in ("rate", "norms"):
            if self.quantile is None and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name}: only a clip that adapts takes it; leave {name} out, or add quantile")
        return self
