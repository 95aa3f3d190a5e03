"""The trunk's codecs: conversion between matrices on the wire and tensors on the trunk's device.

Shapes: T tokens, D the model's width, W width of the hidden states that cross (W < D with a bottleneck).
"""

from __future__ import annotations

import torch

from isthmus.model.device import CPU
from isthmus.privacy.noise import secret_generator
from isthmus.recipe import CodecSection
from isthmus.trunk.earlier_answers import EarlierAnswers
from isthmus.trunk.kept_examples import KeptExamples
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb


class Codecs:
    """Decodes received matrices and encodes answers, with the recipe's codec for each direction.

    Args:
        crossing_width: W.
        width: D.
        kept: the kept examples, which a forward may name instead of sending hidden states.
        device: the trunk's device.
        earlier: the answers before, if answers about examples cross as differences; None: they cross whole.
    """

    def __init__(
        self,
        section: CodecSection,
        crossing_width: int,
        width: int,
        kept: KeptExamples,
        device: torch.device = CPU,
        earlier: EarlierAnswers | None = None,
    ) -> None:
        self._codec = section
        self._crossing_width = crossing_width
        self._width = width
        self._kept = kept
        self._device = device
        self._earlier = earlier
        self._generator = secret_generator(device)

    def decode_forward(self, silo: str, request: pb.Forward) -> torch.Tensor:
        """The hidden states of a forward, ``[T, W]``: those it sent, or the kept ones that it names.

        Raises:
            FrameError: the matrix has another shape or codec, or holds NaN or infinity.
            UnknownExampleError: one of the examples is not kept here.
        """
        if request.examples:
            return self._kept.read(silo, request.examples, request.lengths)
        return self.decode_hidden(request.hidden, sum(request.lengths))

    def decode_hidden(self, matrix: pb.Matrix, rows: int) -> torch.Tensor:
        """Received hidden states, ``[T, W]``.

        Raises:
            FrameError: the matrix has another shape or codec, or holds NaN or infinity.
        """
        return self._decoded(matrix, rows, self._crossing_width, self._codec.forward_up)

    def decode_gradient(self, matrix: pb.Matrix, rows: int) -> torch.Tensor:
        """A received loss gradient, ``[T, D]``.

        Raises:
            FrameError: the matrix has another shape or codec, or holds NaN or infinity.
        """
        return self._decoded(matrix, rows, self._width, self._codec.gradient_up)

    def encode_answer(self, silo: str, request: pb.Forward, h_TD: torch.Tensor) -> pb.Hidden:
        """The answer to a forward.

        Raises:
            DiskFullError: it is to be kept, and the disk is full.
        """
        if self._earlier is not None and request.answered:
            return self._earlier.encode(silo, request, h_TD)
        return self.encode_hidden(h_TD)

    def encode_hidden(self, h_TD: torch.Tensor) -> pb.Hidden:
        """The answer to a decoding step, or to a forward that names no answers before."""
        return pb.Hidden(hidden=codec.encode(h_TD, self._codec.forward_down))

    def encode_gradient(self, gradient_TD: torch.Tensor | None, norm: float) -> pb.Gradient:
        """The answer to a backward; without a matrix where ``gradient_TD`` is None, since the silo's bottom does not
        train."""
        if gradient_TD is None:
            return pb.Gradient(norm=norm)
        return pb.Gradient(gradient=codec.encode(gradient_TD, self._codec.gradient_down, self._generator), norm=norm)

    def _decoded(self, matrix: pb.Matrix, rows: int, width: int, name: str) -> torch.Tensor:
        return codec.decode(matrix, rows=rows, width=width, codec=name, device=self._device)
