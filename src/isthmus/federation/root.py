"""The root's service: plans out, updates in."""

from __future__ import annotations

from google.protobuf.message import Message

from isthmus.errors import ProtocolError
from isthmus.federation.rounds import Rounds
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.report.record import RoleDirectory
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer


class RootService:
    """Implements ``wire.channel.Service``. The root holds no weights: it needs the model's configuration only."""

    def __init__(self, recipe: Recipe, directory: RoleDirectory) -> None:
        self.rounds = Rounds(recipe, shared_shapes(recipe), directory)

    def handle(self, peer: str, request: Message) -> Answer:
        if isinstance(request, pb.Ready):
            return self.rounds.ready(peer)
        if isinstance(request, pb.Update):
            return self.rounds.update(peer, request)
        answer: Answer = Answer()
        if isinstance(request, pb.Ping):
            answer.set_result(pb.Pong())
            return answer
        raise ProtocolError(f"the root does not answer {type(request).__name__}", remedy="ask the trunk")


def shared_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter tensors that the silos of this recipe share."""
    config = Checkpoint(recipe.model.path).config
    return adapters.shared_shapes(adapters.empty_ends(config, recipe))
