"""The root's service: plans out, updates in."""

from __future__ import annotations

from pathlib import Path

import torch
from google.protobuf.message import Message

from isthmus.errors import ProtocolError
from isthmus.federation.rounds import Rounds
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.report.record import RoleDirectory
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire import offer
from isthmus.wire.channel import Answer
from isthmus.wire.identity import Identity


class RootService:
    """Implements ``wire.channel.Service``. The root holds no weights: it needs the model's configuration only.

    Args:
        identity: of the process, to check what silos sign where updates are masked; left out, the root's own.
    """

    def __init__(self, recipe: Recipe, directory: RoleDirectory, identity: Identity | None = None) -> None:
        self.rounds = Rounds(recipe, shared_tensors(recipe), directory)
        if recipe.federation.masks and identity is None:
            identity = Identity.load(Path(recipe.wire.certificates), "root")
        self._identity = identity

    def handle(self, peer: str, request: Message) -> Answer:
        if isinstance(request, pb.Ready):
            return self.rounds.ready(peer, self._keys(peer, request))
        if isinstance(request, (pb.Update, pb.Deal, pb.Reveal)):
            return self.rounds.contribute(peer, request)
        answer: Answer = Answer()
        if isinstance(request, pb.Ping):
            answer.set_result(pb.Pong())
            return answer
        raise ProtocolError(f"the root does not answer {type(request).__name__}", remedy="ask the trunk")

    def _keys(self, peer: str, request: pb.Ready) -> pb.SumKeys | None:
        """The keys that a silo offers. It must have signed them: the others would refuse them, and the round with them.

        Raises:
            IdentityError: it has not.
        """
        if self._identity is None or not request.HasField("keys"):
            return None
        offer.verify(self._identity, peer, request.keys)
        return request.keys


def shared_tensors(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The adapter tensors that the silos of this recipe share, as each of them starts with them."""
    config = Checkpoint(recipe.model.path).config
    shared = adapters.shared_shapes(adapters.empty_ends(config, recipe))
    return {name: tensor for name, tensor in adapters.initial_tensors(config, recipe).items() if name in shared}
