"""A trunk that computes nothing, beside a silo whose own part alone matters."""

from __future__ import annotations

import torch
from google.protobuf.message import Message

from isthmus.errors import ProtocolError
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer


class ZeroTrunk:
    """A stand-in for the trunk that answers forwards, backwards and decoded tokens with zeros, where only the silo's
    own part matters."""

    def __init__(self, recipe: Recipe) -> None:
        self._codecs = recipe.boundary.codec
        self._width: int = Checkpoint(recipe.model.path).config.get_text_config().hidden_size
        self._sent: dict[int, int] = {}
        """By step: the width of its hidden states, which their gradient has, too."""

    def handle(self, peer: str, request: Message) -> Answer:
        """Answer a request of ``wire.channel.Service``."""
        answer: Answer = Answer()
        answer.set_result(self._answer(request))
        return answer

    def _answer(self, request: Message) -> Message:
        if isinstance(request, pb.Hello):
            return pb.Welcome()
        if isinstance(request, pb.Keep):
            return pb.Kept()
        if isinstance(request, pb.Close):
            return pb.Closed()
        if isinstance(request, pb.Forward | pb.Decode):
            if isinstance(request, pb.Forward) and request.train:
                self._sent[request.step] = request.hidden.width
            zeros_TD = torch.zeros(sum(request.lengths), self._width)
            return pb.Hidden(hidden=codec.encode(zeros_TD, self._codecs.forward_down))
        if isinstance(request, pb.Backward):
            width = self._sent.pop(request.step, 0)
            if not request.reply:
                return pb.Gradient()
            zeros_TW = torch.zeros(request.gradient.rows, width)
            return pb.Gradient(gradient=codec.encode(zeros_TW, self._codecs.gradient_down))
        raise ProtocolError(f"ZeroTrunk does not answer {type(request).__name__}", remedy="use TrunkService")
