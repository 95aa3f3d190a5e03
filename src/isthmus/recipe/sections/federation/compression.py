"""``[federation.compression]``: smaller updates."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from isthmus.recipe.section import Section

UNDER_MASKS = {"none": True, "top-k": False, "random-k": True, "sketch": True}
"""Whether a masked sum can have each kind: it must be linear and the same for all silos."""


class CompressionSection(Section):
    """Smaller updates; ``compression = "top-k"`` sets kind."""

    main = "kind"

    kind: Literal["none", "top-k", "random-k", "sketch"] = "none"
    """Which numbers of an update cross. "none": all. "top-k": the largest, with their places; not with masks.
    "random-k": those at places drawn for all silos alike. "sketch": some numbers of a random rotation of the update,
    which all have about one size. "top-k" is experimental: not measured on a real model."""
    keep: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of an update's numbers that cross, with any kind but "none"."""
    bits: Annotated[int, Field(ge=2, le=32)] | None = Field(default=None, examples=[8])
    """Bits of each number that crosses: 4, 8, 16 or 32; with masks 2 to 16. Left out: 32, with masks 16."""
    feedback: bool = True
    """If true, what compression left out is kept in the silo and added to its next update (error feedback)."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "top-k" and not self.feedback:
            raise ValueError(
                "feedback: without it, numbers that are never among the largest are never sent; set feedback = true"
            )
        return self

    @property
    def exact(self) -> bool:
        """Whether updates cross in full: all numbers, 32 bits each."""
        return self.kind == "none" and self.bits is None
