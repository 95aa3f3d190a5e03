"""Matrices and named tensors to bytes and back. Raw little-endian values: nothing that could execute.

Shapes: T tokens (rows), D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from isthmus.errors import FrameError
from isthmus.wire import isthmus_pb2 as pb

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_REMEDY = "both sides must run the same version of isthmus with the same recipe"


def encode(h_TD: torch.Tensor, codec: str) -> pb.Matrix:
    """``h_TD [rows, width]`` of any float dtype as a matrix in this codec."""
    rows, width = h_TD.shape
    return pb.Matrix(codec=codec, rows=rows, width=width, data=_bytes(h_TD, DTYPES[codec]))


def decode(matrix: pb.Matrix, *, rows: int, width: int, codec: str) -> torch.Tensor:
    """The ``[rows, width]`` tensor of a received matrix, in the codec's dtype.

    Raises:
        FrameError: another shape or codec than expected, too few or many bytes, NaN or infinity.
    """
    if matrix.codec != codec:
        raise FrameError(f"matrix in codec {matrix.codec[:20]!r} where {codec!r} was agreed", remedy=_REMEDY)
    if (matrix.rows, matrix.width) != (rows, width):
        raise FrameError(f"matrix {matrix.rows} × {matrix.width} where {rows} × {width} is due", remedy=_REMEDY)
    return _tensor(matrix.data, (rows, width), DTYPES[codec], "matrix")


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


def _bytes(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    plain = tensor.detach().to("cpu", dtype).contiguous()
    return plain.view(-1).view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> torch.Tensor:
    size = math.prod(shape)
    if size == 0 or len(data) != size * dtype.itemsize:
        raise FrameError(f"{name} holds {len(data)} bytes where {size * dtype.itemsize} are due", remedy=_REMEDY)
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
    if not torch.isfinite(tensor).all():
        raise FrameError(f"{name} holds NaN or infinity", remedy="lower the learning rate of the sender")
    return tensor
