"""Attention kernels that compute all sequences of a packed pass in one call.

Launching a kernel takes the host as long for one token as for a thousand. So on accelerators ``packed_attention`` uses
these kernels instead of one call for each sequence: flash attention on packed sequences where torch has it, otherwise
torch's attention on padded ones.

Shapes: T new tokens of all sequences, S visible positions (keys) of all sequences, B sequences, N new tokens of the
sequence with the most, P visible positions of the sequence with the most, H heads, G heads of keys and values, d width
of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from isthmus.model.packing import Padding
from isthmus.trunk.attention_plan import AttentionPlan

WIDEST_HEAD = 256
"""Largest width of a head for which flash attention has kernels."""
AMPERE = (8, 0)
"""Lowest CUDA compute capability with flash attention."""


class PackedLayout:
    """The layout of a pass's concatenated sequences, among the queries and among the keys.

    Args:
        new: number of new tokens (queries) of each sequence.
        seen: number of keys of each sequence; the new tokens are the last of them.
        window: number of positions that a token attends to at most, including its own; None: all up to its own.
    """

    def __init__(self, new: list[int], seen: list[int], window: int | None, device: torch.device) -> None:
        self.new = new
        self.seen = seen
        self.window = window
        self._device = device

    @cached_property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cumulative lengths of the sequences among queries and keys, from 0, int32 ``[B + 1]`` each."""
        starts = [list(accumulate(sizes, initial=0)) for sizes in (self.new, self.seen)]
        starts_q, starts_k = torch.tensor(starts, dtype=torch.int32).to(self._device)
        return starts_q, starts_k

    @cached_property
    def queries(self) -> Padding:
        """Padding of the queries to ``[B, N]``."""
        return Padding(self.new, self._device)

    @cached_property
    def keys(self) -> Padding:
        """Padding of the keys to ``[B, P]``."""
        return Padding(self.seen, self._device)

    @cached_property
    def mask(self) -> torch.Tensor:
        """Boolean attention mask ``[B, 1, N, P]``, True where a query may attend to a key. Padding attends to the same
        keys as its sequence's last token, since the softmax of no keys is NaN."""
        new_B1, seen_B1 = torch.tensor([self.new, self.seen]).to(self._device).unsqueeze(2).unbind(0)
        query_N = torch.arange(max(self.new), device=self._device)
        key_P = torch.arange(max(self.seen), device=self._device)
        own_BN1 = (seen_B1 - new_B1 + torch.minimum(query_N, new_B1 - 1)).unsqueeze(2)
        mask_BNP = key_P <= own_BN1
        if self.window is not None:
            mask_BNP = mask_BNP & (key_P > own_BN1 - self.window)
        return mask_BNP.unsqueeze(1)


class Kernel(Protocol):
    """A function that computes the attention of all sequences, each to its own keys only, in one call."""

    def __call__(
        self,
        query_1HTd: torch.Tensor,
        key_1GSd: torch.Tensor,
        value_1GSd: torch.Tensor,
        layout: PackedLayout,
        scale: float | None,
    ) -> torch.Tensor:
        """The attention's output, ``[1, T, H, d]``."""
        ...


def attend_padded(
    query_1HTd: torch.Tensor,
    key_1GSd: torch.Tensor,
    value_1GSd: torch.Tensor,
    layout: PackedLayout,
    scale: float | None,
) -> torch.Tensor:
    """The kernel that pads the sequences and uses torch's attention with a mask, on any device and dtype. Output
    ``[1, T, H, d]``."""
    query_BHNd = layout.queries.pad(query_1HTd[0], dim=1).transpose(0, 1)
    groups = query_BHNd.shape[1] // key_1GSd.shape[1]
    key_BHPd, value_BHPd = (
        layout.keys.pad(states[0], dim=1).transpose(0, 1).repeat_interleave(groups, dim=1)
        for states in (key_1GSd, value_1GSd)
    )
    output_BHNd = scaled_dot_product_attention(query_BHNd, key_BHPd, value_BHPd, attn_mask=layout.mask, scale=scale)
    return layout.queries.unpad(output_BHNd.transpose(1, 2), dim=0).unsqueeze(0)


@dataclass(frozen=True)
class Varlen:
    """The kernel that uses flash attention on packed sequences, for CUDA and 16-bit dtypes.

    Args:
        function: ``torch.nn.attention.varlen.varlen_attn``, which aligns a sequence's last query with its last key.
    """

    function: Callable[..., Any]

    def __call__(
        self,
        query_1HTd: torch.Tensor,
        key_1GSd: torch.Tensor,
        value_1GSd: torch.Tensor,
        layout: PackedLayout,
        scale: float | None,
    ) -> torch.Tensor:
        query_THd, key_SGd, value_SGd = (states[0].transpose(0, 1) for states in (query_1HTd, key_1GSd, value_1GSd))
        left = -1 if layout.window is None else layout.window - 1
        output_THd: torch.Tensor = self.function(
            query_THd,
            key_SGd,
            value_SGd,
            *layout.bounds,
            max(layout.new),
            max(layout.seen),
            scale=scale,
            window_size=(left, 0),
            enable_gqa=query_THd.shape[1] != key_SGd.shape[1],
        )
        return output_THd.unsqueeze(0)


def kernel_for(plan: AttentionPlan, device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """The kernel for passes of several sequences; None: use the part's own attention, one sequence at a time.

    Only ``sdpa`` has a kernel: other attentions may cap logits or have sinks.
    """
    if plan.attention != "sdpa" or not plan.uniform or device.type == "cpu":
        return None
    head = plan.key_width
    flash = dtype in (torch.float16, torch.bfloat16) and head % 8 == 0 and head <= WIDEST_HEAD
    if flash and device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= AMPERE:
        function = find_varlen()
        if function is not None:
            return Varlen(function)
    return attend_padded


def find_varlen() -> Callable[..., Any] | None:
    """Torch's flash attention on packed sequences; None if this version of torch has none with windows and grouped
    heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None
