"""Kept examples: hidden states that each silo released once and that later forwards name by number.

Shapes: T tokens of all sequences, concatenated; D width.
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


class KeptExamples:
    """The examples on the trunk's disk, by the silo's certified name and a number that the silo chose.

    A silo cannot name another silo's examples. Each silo has an equal share of ``trunk.kept_bytes``, so that it cannot
    evict another silo's examples either.

    Args:
        folder: holds one folder for each silo and in it one file for each example, the matrix as received.
        width: D.
        device: the device to which examples are read.
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
        """Store an example of this silo; its least recently used examples are evicted to make room.

        Raises:
            ProtocolError: the recipe does not set ``boundary.release_once``.
            FrameError: the matrix has another width or codec, or holds NaN or infinity.
            FrameSizeError: the example alone is larger than the silo's share.
            DiskFullError: the disk is full.
        """
        if not self._agreed:
            raise ProtocolError("this trunk keeps no examples", remedy="set boundary.release_once on both sides")
        self._decoded(request.hidden, request.hidden.rows)  # refuse invalid examples now, not when they are used
        value, store = request.hidden.SerializeToString(), self._store(peer)
        if not store.fits(len(value)):
            raise FrameSizeError(
                f"received an example of {len(value):,} bytes; the limit is a silo's share of {self._share:,} bytes",
                remedy="raise trunk.kept_bytes, lower train.max_tokens or choose a smaller boundary.codec",
            )
        store.write(request.example, value)

    def read(self, peer: str, examples: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """The hidden states of the silo's examples with these numbers, ``[T, D]``.

        Args:
            lengths: expected tokens of each example.

        Raises:
            UnknownExampleError: an example is not kept here: evicted, lost, or never sent.
            FrameError: an example has another length.
            FrameSizeError: together they are larger than ``wire.max_frame_bytes``.
        """
        matrices, size = [], 0
        for example in examples:
            matrix = self._matrix(peer, example)
            matrices.append(matrix)
            size += len(matrix.data)
            if size > self._limit:
                raise FrameSizeError(
                    f"one forward names kept examples of more than {self._limit:,} bytes",
                    remedy="use smaller batches, or raise wire.max_frame_bytes on both sides",
                )
        return torch.cat([self._decoded(matrix, rows) for matrix, rows in zip(matrices, lengths, strict=True)])

    def _matrix(self, peer: str, example: int) -> pb.Matrix:
        value = self._store(peer).read(example)
        if value is not None:
            with suppress(DecodeError):  # the file may be corrupted
                return pb.Matrix.FromString(value)
        raise UnknownExampleError(
            f"no example {example:016x} of {peer} is kept here",
            remedy="send it again; if it is evicted at once, raise trunk.kept_bytes or lower train.batch",
        )

    def _store(self, peer: str) -> Store:
        if peer not in self._stores:
            self._stores[peer] = Store(self._folder / peer, self._share)
        return self._stores[peer]

    def _decoded(self, matrix: pb.Matrix, rows: int) -> torch.Tensor:
        if matrix.rows != rows:
            raise FrameError(
                f"the kept example has {matrix.rows} tokens, the forward says {rows}",
                remedy="send it under a new number",
            )
        return codec.decode(matrix, rows=rows, width=self._width, codec=self._codec, device=self._device)
