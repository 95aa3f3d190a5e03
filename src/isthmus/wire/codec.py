"""Codecs: matrices and named tensors as raw little-endian bytes, never as executable formats such as pickle.

A codec's name is one of ``MATRIX_CODECS``, such as ``int8``, optionally with ``+zstd``, which compresses the bytes, or
one of ``RANGE_CODECS``, such as ``range-0.5``.

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
from isthmus.wire.range_coded import RangeCoded

ZSTD = "+zstd"
ZSTD_LEVEL = 1
SMALL_MATRIX = 2**16
"""Largest number of values of a matrix that is always coded on the CPU: one copy is cheaper than many small kernels."""
_CPU = torch.device("cpu")
_REMEDY = "both sides must run the same version of isthmus with the same recipe"


class MatrixCodec(Protocol):
    """A byte format for float matrices ``[rows, width]``."""

    def encode(self, h_TD: torch.Tensor, generator: torch.Generator | None = None) -> bytes:
        """The bytes of a matrix ``[T, D]``. With a generator, lossy codecs round at random and without bias."""
        ...

    def decode(self, data: bytes, rows: int, width: int, device: torch.device = _CPU) -> torch.Tensor:
        """The matrix on this device, in a float dtype without further loss.

        Raises:
            FrameError: the bytes are not an encoded matrix of this shape, or it holds NaN or infinity.
        """
        ...

    def most_bytes(self, rows: int, width: int) -> int:
        """The largest number of bytes of an encoded matrix of this shape."""
        ...


@dataclass(frozen=True)
class RawCodec:
    """The matrix codec that writes every value in ``dtype``."""

    dtype: torch.dtype

    def encode(self, h_TD: torch.Tensor, generator: torch.Generator | None = None) -> bytes:
        return _bytes(h_TD, self.dtype)

    def decode(self, data: bytes, rows: int, width: int, device: torch.device = _CPU) -> torch.Tensor:
        return _tensor(data, (rows, width), self.dtype, "the matrix", device)

    def most_bytes(self, rows: int, width: int) -> int:
        return rows * width * self.dtype.itemsize


MATRIX_CODECS: dict[str, MatrixCodec] = {
    "fp32": RawCodec(torch.float32),
    "bf16": RawCodec(torch.bfloat16),
    "fp16": RawCodec(torch.float16),
    "int8": Blockwise(8),
    "int4": Blockwise(4),
}
RANGE_CODECS = {f"range-{step:g}": RangeCoded(step) for step in (0.25, 0.5, 0.75, 1.0, 2.0)}
"""Those that can write a matrix as its difference from one that both sides have."""
CODEC_NAMES = (*MATRIX_CODECS, *(name + ZSTD for name in MATRIX_CODECS), *RANGE_CODECS)
"""Names of all codecs."""


def encode(
    h_TD: torch.Tensor,
    name: str,
    generator: torch.Generator | None = None,
    reference_TD: torch.Tensor | None = None,
) -> pb.Matrix:
    """The matrix message of ``h_TD [T, D]``, of any float dtype and device, in the codec of this name.

    Args:
        generator: for random rounding (see ``MatrixCodec.encode``).
        reference_TD: a matrix that the receiver has, too: the difference from it is encoded. For ``RANGE_CODECS``.
    """
    rows, width = h_TD.shape
    if name in RANGE_CODECS:
        data = RANGE_CODECS[name].encode(h_TD, generator, reference_TD)
        return pb.Matrix(codec=name, rows=rows, width=width, data=data)
    assert reference_TD is None
    h_TD = h_TD.detach().to(h_TD.device if rows * width > SMALL_MATRIX else _CPU)
    data = MATRIX_CODECS[name.removesuffix(ZSTD)].encode(h_TD, generator)
    if name.endswith(ZSTD):
        data = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data)
    return pb.Matrix(codec=name, rows=rows, width=width, data=data)


def decode(
    matrix: pb.Matrix,
    *,
    rows: int,
    width: int,
    codec: str,
    device: torch.device = _CPU,
    reference_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tensor ``[rows, width]`` of a received matrix message, in a float dtype, on this device.

    Args:
        reference_TD: as of ``encode``.

    Raises:
        FrameError: its shape or codec is not the expected one, its bytes are invalid, or it holds NaN or infinity.
    """
    if matrix.codec != codec:
        raise FrameError(f"received a matrix in codec {matrix.codec[:20]!r}, expected {codec!r}", remedy=_REMEDY)
    if (matrix.rows, matrix.width) != (rows, width):
        raise FrameError(f"received a matrix {matrix.rows} × {matrix.width}, expected {rows} × {width}", remedy=_REMEDY)
    if not rows * width:
        raise FrameError("received an empty matrix", remedy=_REMEDY)
    if codec in RANGE_CODECS:
        return RANGE_CODECS[codec].decode(matrix.data, rows, width, device, reference_TD)
    base = MATRIX_CODECS[codec.removesuffix(ZSTD)]
    data = decompressed(matrix.data, base.most_bytes(rows, width)) if codec.endswith(ZSTD) else matrix.data
    return base.decode(data, rows, width, device if rows * width > SMALL_MATRIX else _CPU).to(device)


def encode_named(tensors: Mapping[str, torch.Tensor]) -> list[pb.Tensor]:
    """The tensor messages of these tensors, fp32, in the order of their names."""
    return [
        pb.Tensor(name=name, shape=list(tensors[name].shape), data=_bytes(tensors[name], torch.float32))
        for name in sorted(tensors)
    ]


def decode_named(tensors: Iterable[pb.Tensor], expected: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of received messages, fp32, which must have exactly the expected names and shapes.

    Raises:
        FrameError: a name is missing, unexpected or repeated, a shape is wrong, or a value is NaN or infinite.
    """
    found: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        if tensor.name not in expected or tensor.name in found:
            raise FrameError(f"received the unexpected tensor {tensor.name[:80]!r}", remedy=_REMEDY)
        if tuple(tensor.shape) != expected[tensor.name]:
            raise FrameError(
                f"{tensor.name} has shape {tuple(tensor.shape)}, expected {expected[tensor.name]}", remedy=_REMEDY
            )
        found[tensor.name] = _tensor(tensor.data, expected[tensor.name], torch.float32, tensor.name)
    if missing := expected.keys() - found.keys():
        raise FrameError(f"the tensor {min(missing)} is missing", remedy=_REMEDY)
    return found


def decompressed(data: bytes, most: int) -> bytes:
    """The decompressed bytes of a zstd frame, at most ``most``, so that a peer cannot make this side allocate more.

    Raises:
        FrameError: the frame declares a larger or no size, or is invalid.
    """
    try:
        size = zstandard.get_frame_parameters(data).content_size
        if size <= most:
            return zstandard.ZstdDecompressor().decompress(data, max_output_size=most)
    except zstandard.ZstdError as error:
        raise FrameError(f"received invalid zstd data: {error}", remedy=_REMEDY) from error
    raise FrameError(f"received compressed data of {size} bytes, allowed are {most}", remedy=_REMEDY)


def _bytes(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    values = tensor.detach().to("cpu", dtype).contiguous()
    return values.view(-1).view(torch.uint8).numpy().tobytes()


def _tensor(
    data: bytes, shape: tuple[int, ...], dtype: torch.dtype, name: str, device: torch.device = _CPU
) -> torch.Tensor:
    size = math.prod(shape)
    if size == 0 or len(data) != size * dtype.itemsize:
        raise FrameError(f"{name} has {len(data)} bytes, expected {size * dtype.itemsize}", remedy=_REMEDY)
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).to(device).view(shape)
    if not torch.stack(torch.aminmax(tensor)).isfinite().all():  # a device is asked once
        raise FrameError(f"{name} holds NaN or infinity", remedy="lower the sender's learning rate")
    return tensor
