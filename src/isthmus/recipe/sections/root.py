"""``[root]``: the aggregator at the top."""

from __future__ import annotations

from pydantic import Field

from isthmus.recipe.section import Count, Positive, Section, ServerAddress


class RootSection(Section):
    """The aggregator at the top: it averages the updates and begins each round."""

    address: ServerAddress = "localhost:7001"
    """Host and port at which it listens. If trunk and root have one address, one process can serve both."""
    patience: Positive | None = Field(default=None, examples=[300.0])
    """Seconds that the other silos wait for a slow one at the end of a round, counted from the first that is ready.
    Left out: patience."""
    minimum: Count | None = Field(default=None, examples=[2])
    """Fewest silos, or edges, that a round needs. Left out: all of them, or federation.asynchronous.buffer."""
