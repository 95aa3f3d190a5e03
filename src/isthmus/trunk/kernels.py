"""The attention of all sequences of a pass in one call, as accelerators want it.

A call costs an accelerator's host as much for one token as for a thousand. So what ``trunk.attention`` does sequence by
sequence is done here at once: by flash attention on packed sequences where torch has it, else on padded ones.

Shapes: T new tokens of all sequences, S positions that they may see, B sequences, N new tokens of the longest, P
positions of the longest, H heads, G heads of keys and values, d width of a head.
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

WIDEST_HEAD = 256
"""Values of a head up to which flash attention has kernels."""
AMPERE = (8, 0)


class Layout:
    """How the sequences of a pass lie one after another, among the queries and among the keys.

    Args:
        new: tokens of each sequence, the queries.
        seen: positions of each that are among the keys; the new ones are the last of them.
        window: positions that a token may see at most, its own included; None: all up to its own.
    """

    def __init__(self, new: list[int], seen: list[int], window: int | None, device: torch.device) -> None:
        self.new = new
        self.seen = seen
        self.window = window
        self._device = device

    @cached_property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each sequence starts, and the last one ends, among queries and keys, ``[B + 1]``."""
        starts = [list(accumulate(sizes, initial=0)) for sizes in (self.new, self.seen)]
        starts_q, starts_k = torch.tensor(starts, dtype=torch.int32).to(self._device)
        return starts_q, starts_k

    @cached_property
    def queries(self) -> Padding:
        return Padding(self.new, self._device)

    @cached_property
    def keys(self) -> Padding:
        return Padding(self.seen, self._device)

    @cached_property
    def mask(self) -> torch.Tensor:
        """True where a query may see a key, ``[B, 1, N, P]``. What fills rows up sees what its sequence's last token
        does: something, since of nothing there is no softmax."""
        new_B1, seen_B1 = torch.tensor([self.new, self.seen]).to(self._device).unsqueeze(2).unbind(0)
        query_N = torch.arange(max(self.new), device=self._device)
        key_P = torch.arange(max(self.seen), device=self._device)
        own_BN1 = (seen_B1 - new_B1 + torch.minimum(query_N, new_B1 - 1)).unsqueeze(2)
        mask_BNP = key_P <= own_BN1
        if self.window is not None:
            mask_BNP = mask_BNP & (key_P > own_BN1 - self.window)
        return mask_BNP.unsqueeze(1)


class Kernel(Protocol):
    """One call's attention of all sequences, each to itself only."""

    def __call__(
        self,
        query_1HTd: torch.Tensor,
        key_1GSd: torch.Tensor,
        value_1GSd: torch.Tensor,
        layout: Layout,
        scale: float | None,
    ) -> torch.Tensor:
        """``[1, T, H, d]``."""
        ...


def attend_padded(
    query_1HTd: torch.Tensor, key_1GSd: torch.Tensor, value_1GSd: torch.Tensor, layout: Layout, scale: float | None
) -> torch.Tensor:
    """With torch's attention on the padded batch and a mask: any device, any dtype."""
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
    """With flash attention on the sequences as they lie: CUDA, 16 bits.

    Args:
        function: ``torch.nn.attention.varlen.varlen_attn``, which aligns a sequence's last query with its last key.
    """

    function: Callable[..., Any]

    def __call__(
        self,
        query_1HTd: torch.Tensor,
        key_1GSd: torch.Tensor,
        value_1GSd: torch.Tensor,
        layout: Layout,
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


def kernel_for(attention: str, device: torch.device, dtype: torch.dtype, head: int) -> Kernel | None:
    """What a pass of several sequences uses here; None: the part's own attention, sequence by sequence.

    Args:
        attention: that the part would use by itself. Only ``sdpa`` computes what the kernels do: others may cap logits.
        head: values of a head.
    """
    if attention != "sdpa" or device.type == "cpu":
        return None
    flash = dtype in (torch.float16, torch.bfloat16) and head % 8 == 0 and head <= WIDEST_HEAD
    if flash and device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= AMPERE:
        function = find_varlen()
        if function is not None:
            return Varlen(function)
    return attend_padded


def find_varlen() -> Callable[..., Any] | None:
    """Torch's flash attention on packed sequences; None where this torch has none, or one without windows or groups."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None
