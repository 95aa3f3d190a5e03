"""The services of the root and of every edge, made of a recipe. They hold no weights of the model."""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import Future
from pathlib import Path

from google.protobuf.message import Message

from isthmus.errors import ProtocolError, RecipeError
from isthmus.federation.buffered import Buffered
from isthmus.federation.planner import EdgePlanner, Planner, RootPlanner, shared_tensors
from isthmus.federation.rounds import Aggregator, Rounds
from isthmus.model.agreement import agreed_keys, check_agreed, earlier_keys
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT
from isthmus.storage.record import RoleDirectory
from isthmus.updates.between import TrunkBlocks
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel, Service, answered
from isthmus.wire.identity import Identity
from isthmus.wire.senders import check_sender
from isthmus.wire.vitals import Vitals


class GreetedAggregator:
    """An aggregator behind a door: it answers children that have said Hello with the same recipe and model, and what a
    child of their role may ask.

    Implements ``wire.channel.Service``. In one process, whose parties have one recipe, the aggregator needs none.

    Args:
        name: the node's, in the recipe.
        added: silos that were added since the federation began (see ``earlier_keys``).
    """

    def __init__(self, recipe: Recipe, name: str, aggregator: Service, added: Collection[str] = ()) -> None:
        self._keys = agreed_keys(recipe)
        self._earlier = earlier_keys(recipe, self._keys, added)
        self._title = "the root" if name == ROOT else f"the edge {name}"
        self._edges = frozenset(recipe.tree.edges)
        self._aggregator = aggregator
        self._greeted: set[str] = set()

    def handle(self, peer: str, request: Message) -> Answer:
        check_sender(self._title, "Root", "edge" if peer in self._edges else "silo", request)
        if isinstance(request, pb.Hello):
            check_agreed(peer, request.keys, self._title, self._keys, self._earlier)
            self._greeted.add(peer)
            return answered(pb.Welcome())
        if isinstance(request, pb.Ping) and request.HasField("compared"):
            check_agreed(peer, request.compared.keys, self._title, self._keys, self._earlier)
            return answered(pb.Pong(time=time.time()))
        if peer not in self._greeted and not isinstance(request, pb.Ping):
            raise ProtocolError(
                f"received {type(request).__name__} before Hello", remedy="send Hello first on every stream"
            )
        return self._aggregator.handle(peer, request)

    def vitals(self) -> Vitals:
        """Implements ``wire.vitals.Watched``."""
        assert isinstance(self._aggregator, Aggregator)
        return self._aggregator.vitals()

    def end_early(self) -> None:
        """As ``Aggregator.end_early``."""
        assert isinstance(self._aggregator, Aggregator)
        self._aggregator.end_early()

    def hold(self) -> Future[None]:
        """As ``Rounds.hold``, of an aggregator that waits for its silos."""
        assert isinstance(self._aggregator, Rounds)
        return self._aggregator.hold()


def aggregator_of(recipe: Recipe, name: str, planner: Planner, identity: Identity | None = None) -> Aggregator:
    """The service of one node of the tree.

    Args:
        name: the node's, in the recipe.
        identity: of the process, to verify the keys that silos sign where updates are masked, and to sign versions
            where there is a buffer; by default, of masked updates alone, the node's own, from its folder of
            certificates.

    Raises:
        IdentityError: updates are masked, and the node's certificate is unusable.
    """
    if recipe.federation.asynchronous.buffer is not None and isinstance(planner, RootPlanner):
        return Buffered(recipe, planner, identity)
    if recipe.federation.secure.masks and identity is None:
        identity = Identity.load(Path(recipe.wire.certificates), name, "root" if name == ROOT else "edge")
    return Rounds(recipe, planner, name, identity)


def root_service(
    recipe: Recipe, directory: RoleDirectory, identity: Identity | None = None, trunk: TrunkBlocks | None = None
) -> Aggregator:
    """The root's service. It needs the model's configuration only.

    Args:
        directory: where the tensors after each round are kept.
        identity: as in ``aggregator_of``.
        trunk: the trunk in this process, if it is here.

    Raises:
        RecipeError: the recipe trains blocks that some silos keep and others leave to the trunk, which is not here.
    """
    if recipe.trains_between and trunk is None:
        raise RecipeError(
            "federation.between = 'train' averages adapters of the trunk, too, which is not in this process",
            remedy="start both by 'isthmus trunk --with-root', or set federation.between = 'rest'",
        )
    blocks = trunk if recipe.trains_between else None
    return aggregator_of(recipe, ROOT, RootPlanner(recipe, shared_tensors(recipe), directory, blocks), identity)


def edge_service(
    recipe: Recipe, name: str, directory: RoleDirectory, parent: Channel, identity: Identity | None = None
) -> Aggregator:
    """An edge's service. It keeps nothing between rounds: a new process asks for the next plan, as a silo would.

    Args:
        name: the edge's, in the recipe.
        parent: the channel to the edge or root above.
        identity: as in ``aggregator_of``.
    """
    return aggregator_of(recipe, name, EdgePlanner(recipe, shared_tensors(recipe), directory, parent), identity)
