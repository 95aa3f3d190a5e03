"""``[[edge]]``: aggregators between silos and root."""

from __future__ import annotations

from pydantic import Field

from isthmus.recipe.section import Count, Name, Positive, Section, ServerAddress


class EdgeSection(Section):
    """An aggregator between silos and root: it sums the updates of its silos and sends one sum on. Without edges silos
    send their updates to the root."""

    name: Name = Field(examples=["ward"])
    """Name of this edge: 1 to 63 lower-case letters, digits, "-" and "_", beginning with a letter or digit."""
    address: ServerAddress = Field(examples=["localhost:7101"])
    """Host and port at which it listens."""
    silos: tuple[str, ...] = Field(default=(), strict=False, examples=[("north", "south")])
    """Its cohort: names of the silos whose updates it sums; with masks three or more."""
    parent: str | None = Field(default=None, examples=["region"])
    """Name of the edge that gets this one's sums. Left out: the root."""
    sibling: str | None = Field(default=None, examples=["other"])
    """Name of the edge that takes over this one's silos if it fails. Left out: they take no further part."""
    minimum: Count | None = Field(default=None, examples=[2])
    """Fewest silos, or edges, that its part of a round needs. Left out: all of them."""
    patience: Positive | None = Field(default=None, examples=[75.0])
    """Seconds that the others wait for a slow one at the end of a round. Left out: a quarter of its parent's."""
