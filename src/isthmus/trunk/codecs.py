"""The trunk's codecs: between matrices as they cross the wire and tensors as it computes on them.

Shapes: T tokens, D the model's width, W what crosses of it.
"""

from __future__ import annotations

import torch

from isthmus.model.device import CPU
from isthmus.privacy.noise import secret_generator
from isthmus.recipe import CodecSection
from isthmus.trunk.kept import Kept
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb


class Codecs:
    """Decodes what comes in and encodes what goes out, with the recipe's codec for each direction.

    Args:
        crossing_width: of the hidden states that come.
        width: of what the trunk answers.
        kept: the examples that forwards may name instead of bringing them.
        device: where the trunk computes.
    """

    def __init__(
        self, section: CodecSection, crossing_width: int, width: int, kept: Kept, device: torch.device = CPU
    ) -> None:
        self._codec = section
        self._crossing_width = crossing_width
        self._width = width
        self._kept = kept
        self._device = device
        self._generator = secret_generator(device)

    def forward_in(self, silo: str, request: pb.Forward) -> torch.Tensor:
        """A forward's hidden states ``[T, W]``, brought or kept.

        Raises:
            FrameError: they are anything else.
            UnknownExampleError: one of the examples is not kept here.
        """
        if request.examples:
            return self._kept.read(silo, request.examples, request.lengths)
        return self.hidden_in(request.hidden, sum(request.lengths))

    def hidden_in(self, matrix: pb.Matrix, rows: int) -> torch.Tensor:
        """Hidden states ``[T, W]``.

        Raises:
            FrameError: they are anything else.
        """
        return self._decoded(matrix, rows, self._crossing_width, self._codec.forward_up)

    def gradient_in(self, matrix: pb.Matrix, rows: int) -> torch.Tensor:
        """A loss gradient ``[T, D]``; errors as above."""
        return self._decoded(matrix, rows, self._width, self._codec.gradient_up)

    def hidden_out(self, h_TD: torch.Tensor) -> pb.Hidden:
        return pb.Hidden(hidden=codec.encode(h_TD, self._codec.forward_down))

    def gradient_out(self, gradient_TD: torch.Tensor | None) -> pb.Gradient:
        """None: the silo's bottom does not train."""
        if gradient_TD is None:
            return pb.Gradient()
        return pb.Gradient(gradient=codec.encode(gradient_TD, self._codec.gradient_down, self._generator))

    def _decoded(self, matrix: pb.Matrix, rows: int, width: int, name: str) -> torch.Tensor:
        return codec.decode(matrix, rows=rows, width=width, codec=name, device=self._device)
