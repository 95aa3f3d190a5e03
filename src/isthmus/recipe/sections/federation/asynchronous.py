"""``[federation.asynchronous]``: rounds without waiting."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from isthmus.recipe.section import Count, Section


class AsynchronousSection(Section):
    """Rounds without waiting (FedBuff, Nguyen et al. 2022)."""

    buffer: Count | None = Field(default=None, examples=[2])
    """Updates of which the root makes the next version of the shared adapters; one version is one round. Silos begin
    again with the newest version as soon as they are done. Left out: rounds are synchronous, all silos begin and end
    together. Experimental: no recorded gain where silos are equally fast; it wants a smaller train.learning_rate."""
    staleness: Annotated[int, Field(ge=0)] = 10
    """Most versions that may appear while a silo trains; only with buffer. An update that missed n versions has its
    weight divided by √(1 + n); with more than this it is refused, and the silo begins again with the newest version."""
