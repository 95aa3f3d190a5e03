"""Matrices and named tensors to bytes and back. Raw little-endian values: nothing that could execute.

A codec has a name, like ``int8`` or ``fp16+zstd``; ``CODECS`` lists the ways to write a matrix, ``+zstd`` compresses
what they wrote.

Shapes: T tokens (rows), D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import zstandard

from isthmus.errors import FrameError
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.blockwise import Blockwise

ZSTD = "+zstd"
ZSTD_LEVEL = 1
FEW = 2**16
"""Values up to which a matrix is coded on the CPU wherever it is: one copy is cheaper than many small kernels."""
CPU = torch.device("cpu")
_REMEDY = "both sides must run the same version of isthmus with the same recipe"


class Codec(Protocol):
    """A way to write a float matrix ``[rows, width]`` as bytes."""

    def encode(self, h_TD: torch.Tensor, generator: torch.Generator | None = None) -> bytes:
        """The bytes; a codec that rounds coarsely does so at random, without bias, if it gets a generator."""
        ...

    def decode(self, data: bytes, rows: int, width: int, device: torch.device) -> torch.Tensor:
        """The matrix, on this device, in a float dtype that holds all that crossed; ``FrameError`` for bytes it never
        wrote."""
        ...

    def most_bytes(self, rows: int, width: int) -> int:
        """The most that a matrix of this shape takes."""
        ...


@dataclass(frozen=True)
class Plain:
    """Every value in this dtype."""

    dtype: torch.dtype

    def encode(self, h_TD: torch.Tensor, generator: torch.Generator | None = None) -> bytes:
        return _bytes(h_TD, self.dtype)

    def decode(self, data: bytes, rows: int, width: int, device: torch.device) -> torch.Tensor:
        return _tensor(data, (rows, width), self.dtype, "the matrix", device)

    def most_bytes(self, rows: int, width: int) -> int:
        return rows * width * self.dtype.itemsize


CODECS: dict[str, Codec] = {
    "fp32": Plain(torch.float32),
    "bf16": Plain(torch.bfloat16),
    "fp16": Plain(torch.float16),
    "int8": Blockwise(8),
    "int4": Blockwise(4),
}
NAMES = (*CODECS, *(name + ZSTD for name in CODECS))


def encode(h_TD: torch.Tensor, name: str, generator: torch.Generator | None = None) -> pb.Matrix:
    """``h_TD [rows, width]`` of any float dtype and device as a matrix in this codec (see ``Codec.encode``)."""
    rows, width = h_TD.shape
    h_TD = h_TD.detach().to(_workplace(rows * width, h_TD.device))
    data = CODECS[name.removesuffix(ZSTD)].encode(h_TD, generator)
    if name.endswith(ZSTD):
        data = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data)
    return pb.Matrix(codec=name, rows=rows, width=width, data=data)


def decode(matrix: pb.Matrix, *, rows: int, width: int, codec: str, device: torch.device = CPU) -> torch.Tensor:
    """The ``[rows, width]`` tensor of a received matrix, in a float dtype, on this device.

    Raises:
        FrameError: another shape or codec than expected, bytes it never wrote, NaN or infinity.
    """
    if matrix.codec != codec:
        raise FrameError(f"matrix in codec {matrix.codec[:20]!r} where {codec!r} was agreed", remedy=_REMEDY)
    if (matrix.rows, matrix.width) != (rows, width):
        raise FrameError(f"matrix {matrix.rows} × {matrix.width} where {rows} × {width} is due", remedy=_REMEDY)
    if not rows * width:
        raise FrameError("an empty matrix", remedy=_REMEDY)
    plain = CODECS[codec.removesuffix(ZSTD)]
    data = decompressed(matrix.data, plain.most_bytes(rows, width)) if codec.endswith(ZSTD) else matrix.data
    return plain.decode(data, rows, width, _workplace(rows * width, device)).to(device)


def encode_named(tensors: Mapping[str, torch.Tensor]) -> list[pb.Tensor]:
    """Named tensors as fp32, in the order of their names."""
    return [
        pb.Tensor(name=name, shape=list(tensors[name].shape), data=_bytes(tensors[name], torch.float32))
        for name in sorted(tensors)
    ]


def decode_named(tensors: Iterable[pb.Tensor], expected: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The named fp32 tensors of a received frame, which must have exactly the expected names and shapes.

    Raises:
        FrameError: a name is missing, foreign or twice there; a wrong shape; NaN or infinity.
    """
    found: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        if tensor.name not in expected or tensor.name in found:
            raise FrameError(f"unexpected tensor {tensor.name[:80]!r}", remedy=_REMEDY)
        if tuple(tensor.shape) != expected[tensor.name]:
            raise FrameError(f"{tensor.name} has shape {tuple(tensor.shape)}", remedy=_REMEDY)
        found[tensor.name] = _tensor(tensor.data, expected[tensor.name], torch.float32, tensor.name)
    if missing := expected.keys() - found.keys():
        raise FrameError(f"the tensor {min(missing)} is missing", remedy=_REMEDY)
    return found


def decompressed(data: bytes, most: int) -> bytes:
    """What was compressed, if it says that it is no larger than this: a peer cannot make us allocate more.

    Raises:
        FrameError: it says otherwise, or cannot be read.
    """
    try:
        size = zstandard.get_frame_parameters(data).content_size
        if size <= most:
            return zstandard.ZstdDecompressor().decompress(data, max_output_size=most)
    except zstandard.ZstdError as error:
        raise FrameError(f"compressed bytes that cannot be read: {error}", remedy=_REMEDY) from error
    raise FrameError(f"compressed bytes of {size} where at most {most} are due", remedy=_REMEDY)


def _bytes(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    plain = tensor.detach().to("cpu", dtype).contiguous()
    return plain.view(-1).view(torch.uint8).numpy().tobytes()


def _workplace(values: int, device: torch.device) -> torch.device:
    """Where so many values of this device are coded."""
    return device if values > FEW else CPU


def _tensor(
    data: bytes, shape: tuple[int, ...], dtype: torch.dtype, name: str, device: torch.device = CPU
) -> torch.Tensor:
    size = math.prod(shape)
    if size == 0 or len(data) != size * dtype.itemsize:
        raise FrameError(f"{name} holds {len(data)} bytes where {size * dtype.itemsize} are due", remedy=_REMEDY)
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).to(device).view(shape)
    if not torch.stack(torch.aminmax(tensor)).isfinite().all():  # a device is asked once
        raise FrameError(f"{name} holds NaN or infinity", remedy="lower the sender's learning rate")
    return tensor
