"""The services of the root and of every edge: plans out, updates in."""

from __future__ import annotations

from pathlib import Path

from google.protobuf.message import Message

from isthmus.errors import ProtocolError
from isthmus.federation.buffered import Buffered
from isthmus.federation.planner import EdgePlanner, Planner, RootPlanner, shared_tensors
from isthmus.federation.rounds import Rounds
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT
from isthmus.storage.record import RoleDirectory
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel, answered
from isthmus.wire.identity import Identity
from isthmus.wire.sum_keys import verify_keys


class Aggregator:
    """Implements ``wire.channel.Service`` for one node of the tree. It holds no weights of the model.

    Args:
        name: of the node.
        identity: of the process, to check what silos sign where updates are masked; left out, the node's own.
    """

    def __init__(self, recipe: Recipe, name: str, planner: Planner, identity: Identity | None = None) -> None:
        self.rounds: Rounds | Buffered
        if recipe.federation.asynchronous.buffer is not None and isinstance(planner, RootPlanner):
            self.rounds = Buffered(recipe, planner)
        else:
            self.rounds = Rounds(recipe, planner, name)
        if recipe.federation.secure.masks and identity is None:
            identity = Identity.load(Path(recipe.wire.certificates), name)
        self._identity = identity

    def handle(self, peer: str, request: Message) -> Answer:
        if isinstance(request, pb.Ready):
            self._check_keys(peer, request)
            return self.rounds.ready(peer, request)
        if isinstance(request, (pb.Update, pb.Deal, pb.Reveal)):
            return self.rounds.contribute(peer, request)
        if isinstance(request, pb.Ping):
            return answered(pb.Pong())
        raise ProtocolError(f"no aggregator answers {type(request).__name__}", remedy="ask the trunk")

    def _check_keys(self, peer: str, request: pb.Ready) -> None:
        """A silo must have signed its keys: the others would refuse them, and the round with them.

        Raises:
            IdentityError: it has not.
        """
        if self._identity is not None and request.HasField("keys"):
            verify_keys(self._identity, peer, request.keys)


class RootService(Aggregator):
    """It holds no weights: it needs the model's configuration only.

    Args:
        identity: of the process, to check what silos sign where updates are masked; left out, the root's own.
    """

    def __init__(self, recipe: Recipe, directory: RoleDirectory, identity: Identity | None = None) -> None:
        super().__init__(recipe, ROOT, RootPlanner(recipe, shared_tensors(recipe), directory), identity)


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
        super().__init__(recipe, name, EdgePlanner(recipe, shared_tensors(recipe), directory, parent), identity)
