"""``[boundary]``: what leaves a silo, and how it is protected."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from isthmus.recipe.section import Count, Section
from isthmus.recipe.sections.boundary.codec import CodecSection
from isthmus.recipe.sections.boundary.defence import DefenceSection
from isthmus.recipe.sections.boundary.release import ReleaseSection


class BoundarySection(Section):
    """The tensors that leave a silo, and how each is protected on the way out."""

    tail: Count | None = Field(default=None, examples=[8])
    """How many of a prompt's last positions cross to the trunk; the others stay in bottom. Left out: all cross."""
    width: Count | None = Field(default=None, examples=[64])
    """Numbers for each token that cross, by a learned projection. Left out: as many as the model is wide."""
    residual: bool = False
    """If true, the trunk answers with what its blocks add, and the silo adds it to its own states, which have no noise.
    Top then sees every position, those that never crossed too."""
    denoise: bool = False
    """If true, top gets the noise that its own silo drew as input, and learns to take its effect out of the trunk's
    answer. Not with release_once. Experimental: no recorded gain on a real model."""
    gradients: bool = True
    """If false, no loss gradient leaves: the trunk's adapter does not train, and bottom trains through the residual
    path alone."""
    release_once: bool = False
    """If true, the hidden states of an example leave once, noised once; the trunk keeps them, and later epochs name
    them by a number. Needs lora.freeze_bottom, because a bottom that trains gives other states each time."""
    differences: bool = False
    """If true, the trunk's answer about an example that it answered before crosses as the difference from that answer.
    Needs release_once, by whose numbers both sides know an example, and a range codec for codec.forward_down."""
    codec: CodecSection = CodecSection()
    forward: ReleaseSection = ReleaseSection(noise=0.025)
    """Hidden states, in training and inference alike."""
    gradient: ReleaseSection = ReleaseSection(noise=1e-5)
    """The loss gradient on its way into the trunk."""
    update: ReleaseSection = ReleaseSection(noise=1e-4)
    """The adapter update at the end of a round, clipped as a whole. Where silos noise the masked sum
    (federation.noise), that takes the place of this table."""
    defence: DefenceSection | None = None

    @field_validator("codec", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return dict.fromkeys(CodecSection.model_fields, value) if isinstance(value, str) else value
