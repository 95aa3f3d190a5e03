"""A part's hidden states without its activations: some rows at a time, and computed again in the backward.

Shapes: B rows, L positions, D the model's width.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from isthmus.model.cut import Part

TOKENS_AT_ONCE = 1024
"""Positions of the rows whose activations are there at a time, unless one row has more."""
LARGE = 2**20
"""Bytes from which a tensor's memory goes back to the operating system as soon as it is freed."""
_MMAP_THRESHOLD = -3
"""The option's number in the C library (glibc)."""


def hidden_recomputed(part: Part, inputs: dict[str, Any]) -> torch.Tensor:
    """``part.hidden``, ``[B, L, D]``, within rounding, whose graph keeps inputs and results alone.

    Its backward computes each piece's activations again, with the same dropout.

    Args:
        inputs: arguments of ``part.hidden`` without a cache. A tensor has the batch's rows, or one for all.
    """
    first = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs["input_ids"]
    rows = max(1, TOKENS_AT_ONCE // first.shape[1])
    pieces = [_rows(inputs, len(first), slice(start, start + rows)) for start in range(0, len(first), rows)]
    return torch.cat([checkpoint(_hidden, part, piece, use_reentrant=False) for piece in pieces])


def return_large_tensors() -> None:
    """From now on this process gives freed memory of large tensors back at once, where the C library (glibc) can.

    It keeps them for later otherwise, up to 32 MiB each, and as they differ in size, more and more of them.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE)


def _hidden(part: Part, inputs: dict[str, Any]) -> torch.Tensor:
    return part.hidden(**inputs)


def _rows(inputs: dict[str, Any], batch: int, rows: slice) -> dict[str, Any]:
    def of(value: Any) -> Any:
        return value[rows] if isinstance(value, torch.Tensor) and len(value) == batch else value

    return {name: of(value) for name, value in inputs.items()}
