"""What the trunk keeps: hidden states of examples, as each silo released them once.

Shapes: T tokens of all sequences one after another, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from google.protobuf.message import DecodeError

from isthmus.errors import FrameError, FrameSizeError, ProtocolError, UnknownExampleError
from isthmus.model.device import CPU
from isthmus.recipe import Recipe
from isthmus.storage.store import Store
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb


class Kept:
    """Examples on disk, by the silo's certified name and the number it gave: no silo can name another's.

    Each silo has an equal share of ``trunk.kept_bytes``, so that none can push out another's.

    Args:
        folder: one folder a silo in it, one file an example: the matrix as it came.
        width: of the hidden states.
        device: where they are read to.
    """

    def __init__(self, folder: Path, recipe: Recipe, width: int, device: torch.device = CPU) -> None:
        self._folder = folder
        self._width = width
        self._device = device
        self._agreed = recipe.boundary.release_once
        self._codec = recipe.boundary.codec.forward_up
        self._share = recipe.trunk.kept_bytes // len(recipe.silo)
        self._limit = recipe.wire.max_frame_bytes
        self._stores: dict[str, Store] = {}

    def write(self, peer: str, request: pb.Keep) -> None:
        """Keep this example of the silo's; those longest unused make room.

        Raises:
            ProtocolError: by this recipe nothing is kept.
            FrameError: no matrix that a forward could use.
            FrameSizeError: the example alone is larger than the silo's share.
            DiskFullError: the disk has no room.
        """
        if not self._agreed:
            raise ProtocolError("this trunk keeps no examples", remedy="set boundary.release_once on both sides")
        self._decoded(request.hidden, request.hidden.rows)  # refused as it comes, not when it is used
        value, store = request.hidden.SerializeToString(), self._store(peer)
        if not store.fits(len(value)):
            raise FrameSizeError(
                f"an example of {len(value):,} bytes, a silo's share of the trunk's disk is {self._share:,}",
                remedy="raise trunk.kept_bytes, lower train.max_tokens or choose a smaller boundary.codec",
            )
        store.write(request.example, value)

    def read(self, peer: str, examples: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """The hidden states ``[T, D]`` of these examples of the silo's, which must have these lengths.

        Raises:
            UnknownExampleError: one is not kept here: evicted, lost, or never sent.
            FrameError: one has another length.
            FrameSizeError: together they are larger than a frame that held them could be.
        """
        matrices, size = [], 0
        for example in examples:
            matrix = self._matrix(peer, example)
            matrices.append(matrix)
            size += len(matrix.data)
            if size > self._limit:
                raise FrameSizeError(
                    f"kept examples of more than {self._limit:,} bytes in one forward",
                    remedy="use fewer rows at a time, or raise wire.max_frame_bytes on both sides",
                )
        return torch.cat([self._decoded(matrix, rows) for matrix, rows in zip(matrices, lengths, strict=True)])

    def _matrix(self, peer: str, example: int) -> pb.Matrix:
        value = self._store(peer).read(example)
        if value is not None:
            with suppress(DecodeError):  # the disk may have spoilt it
                return pb.Matrix.FromString(value)
        raise UnknownExampleError(
            f"no example {example:016x} of {peer} is kept here",
            remedy="send it again; if it is gone at once, raise trunk.kept_bytes or lower train.batch",
        )

    def _store(self, peer: str) -> Store:
        if peer not in self._stores:
            self._stores[peer] = Store(self._folder / peer, self._share)
        return self._stores[peer]

    def _decoded(self, matrix: pb.Matrix, rows: int) -> torch.Tensor:
        if matrix.rows != rows:
            raise FrameError(f"an example of {matrix.rows} tokens is kept, not of {rows}", remedy="name it anew")
        return codec.decode(matrix, rows=rows, width=self._width, codec=self._codec, device=self._device)
