"""An edge: sums its cohort blind and passes one sum up."""

from __future__ import annotations

from isthmus.federation.aggregator import Aggregator
from isthmus.federation.planner import Relay
from isthmus.federation.root import shared_tensors
from isthmus.recipe import Recipe
from isthmus.storage.record import RoleDirectory
from isthmus.wire.channel import Channel
from isthmus.wire.identity import Identity


class EdgeService(Aggregator):
    """It knows nothing between rounds: one that starts again asks for the next plan, as a silo would.

    Args:
        name: in the recipe.
        parent: the way to the edge or root above.
        identity: its own; left out, it is read from its folder of certificates.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        directory: RoleDirectory,
        parent: Channel,
        identity: Identity | None = None,
    ) -> None:
        super().__init__(recipe, name, Relay(recipe, shared_tensors(recipe), directory, parent), identity)
