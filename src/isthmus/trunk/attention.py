"""Packed computing: many sequences one after another in one pass, each attending to itself and its own cache.

Everything but attention treats tokens alike, so sequences of any lengths and owners share one pass without padding.
Attention is the family's own, called for each sequence; on an accelerator one kernel's, for all at once.

Shapes: T tokens of all sequences, S positions that they may see, N new tokens of one, P positions of one in its cache,
H heads, d width of a head, L blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from isthmus.model.cut import Part
from isthmus.trunk.kernels import Kernel, Layout

NAME = "isthmus_packed"
SMALLEST = 64
"""Positions that a cache has room for at first; the room doubles when it is full."""


class SequenceCache:
    """Keys and values of one sequence at every block."""

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._shape = (config.num_hidden_layers, 2, 1, getattr(config, "num_key_value_heads", None) or heads)
        self._kv = torch.empty(*self._shape, 0, width, dtype=dtype, device=device)
        self._limit: int = config.max_position_embeddings
        self.length = 0

    @property
    def head(self) -> int:
        """Values of a head."""
        return self._kv.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of memory taken, room included."""
        return self._kv.nbytes

    def bytes_for(self, length: int) -> int:
        """Bytes that this cache would take with so many positions."""
        layers, two, one, heads = self._shape
        values: int = layers * two * one * heads * self._room(length) * self._kv.shape[-1]
        return values * self._kv.element_size()

    def reserve(self, length: int) -> None:
        """Make room for so many positions."""
        room = self._room(length)
        if room > self._kv.shape[-2]:
            grown = self._kv.new_empty(*self._shape, room, self._kv.shape[-1])
            grown[..., : self.length, :] = self._kv[..., : self.length, :]
            self._kv = grown

    def extend(self, block: int, key_1HNd: torch.Tensor, value_1HNd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one block's new keys and values behind the others; returns all ``[1, H, P + N, d]``.

        They count once ``length`` is raised, after the last block.
        """
        end = self.length + key_1HNd.shape[2]
        keys, values = self._kv[block]
        keys[:, :, self.length : end] = key_1HNd
        values[:, :, self.length : end] = value_1HNd
        return keys[:, :, :end], values[:, :, :end]

    def since(self, start: int) -> tuple[torch.Tensor, ...]:
        """Of each block, keys and values from this position on, ``[2, H, P - start, d]``."""
        return self._kv[:, :, 0, :, start : self.length].unbind(0)

    def append(self, kv_L2HNd: torch.Tensor) -> None:
        """Write all blocks' new keys and values behind the others; they count once ``length`` is raised."""
        self._kv[:, :, 0, :, self.length : self.length + kv_L2HNd.shape[-2]] = kv_L2HNd

    def crop(self, length: int) -> None:
        """Forget all positions from this one on."""
        self.length = min(self.length, length)

    def copy(self) -> SequenceCache:
        twin = object.__new__(SequenceCache)
        twin.__dict__ |= self.__dict__
        twin._kv = self._kv.clone()
        return twin

    def _room(self, length: int) -> int:
        room = max(self._kv.shape[-2], SMALLEST)
        while room < length:
            room *= 2
        return max(length, min(room, self._limit))


class Sequences:
    """The sequences of one pass.

    Args:
        attention: name of the attention that the part would use by itself.
        lengths: new tokens of each sequence.
        caches: of each; without them, every sequence starts at position 0 and leaves nothing behind.
        kernel: computes the attention of several at once; None: each is computed by itself.
    """

    def __init__(
        self,
        attention: str,
        lengths: list[int],
        caches: list[SequenceCache] | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        self.attention = attention
        self.lengths = lengths
        self.caches = caches
        self.kernel = kernel if len(lengths) > 1 else None
        self._masks: dict[tuple[int, int, int | None], torch.Tensor | None] = {}
        self._layouts: dict[int | None, tuple[Layout, list[tuple[torch.Tensor, ...]]]] = {}
        self._fresh: list[torch.Tensor] = []
        """Of each block that the kernel has computed, what its caches still lack, ``[2, H, T, d]``."""

    @property
    def even(self) -> bool:
        """One plain batch: all of one length, nothing cached."""
        return self.caches is None and len(set(self.lengths)) == 1

    def positions(self, device: torch.device) -> torch.Tensor:
        """Position of each token within its sequence, ``[1, T]``."""
        pieces = [torch.arange(past, past + new) for past, new in zip(self._past, self.lengths, strict=True)]
        return torch.cat(pieces).unsqueeze(0).to(device)

    def attend(
        self,
        kernel: Kernel,
        block: int,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        window: int | None,
        scale: float | None,
    ) -> torch.Tensor:
        """The attention of all sequences in one call, ``[1, T, H, d]``; caches get the new positions at ``finish``.

        Args:
            states: queries, keys and values of the new tokens, ``[1, H, T, d]``.
        """
        query_1HTd, key_1HTd, value_1HTd = states
        layout, past = self._layout(window, query_1HTd.device)
        if not past:
            return kernel(query_1HTd, key_1HTd, value_1HTd, layout, scale)
        fresh_2HTd = torch.cat((key_1HTd, value_1HTd))
        self._fresh.append(fresh_2HTd)
        new = torch.split(fresh_2HTd, self.lengths, dim=-2)
        pieces = [piece for cached, own in zip(past, new, strict=True) for piece in (cached[block], own)]
        key_1HSd, value_1HSd = torch.cat(pieces, dim=-2).chunk(2)
        return kernel(query_1HTd, key_1HSd, value_1HSd, layout, scale)

    def finish(self) -> None:
        """The new positions are in the caches from here on."""
        if self.caches is None:
            return
        pieces = torch.split(torch.stack(self._fresh), self.lengths, dim=-2) if self._fresh else ()
        for cache, kv_L2HNd in zip(self.caches, pieces, strict=False):
            cache.append(kv_L2HNd)
        for cache, new in zip(self.caches, self.lengths, strict=True):
            cache.length += new

    def mask(self, new: int, past: int, window: int | None, config: PreTrainedConfig, like: torch.Tensor) -> Any:
        """What ``new`` tokens after ``past`` cached positions may attend to, as the attention takes it; made once a
        pass. None where the attention needs none."""
        key = (new, past, window)
        if key not in self._masks:
            inside = window is None or past + new <= window
            causal = past == 0 and inside and self.attention == "sdpa"
            self._masks[key] = None if new == 1 or causal else self._make_mask(new, past, window, config, like)
        return self._masks[key]

    @property
    def _past(self) -> list[int]:
        return [cache.length for cache in self.caches] if self.caches else [0] * len(self.lengths)

    def _layout(self, window: int | None, device: torch.device) -> tuple[Layout, list[tuple[torch.Tensor, ...]]]:
        """How the sequences lie, and of each the cached positions that a new token can see; made once a pass."""
        if window not in self._layouts:
            starts = [0 if window is None else max(0, past - window + 1) for past in self._past]
            seen = [past - start + new for past, start, new in zip(self._past, starts, self.lengths, strict=True)]
            cached = [cache.since(start) for cache, start in zip(self.caches or (), starts, strict=False)]
            self._layouts[window] = Layout(self.lengths, seen, window, device), cached
        return self._layouts[window]

    def _make_mask(self, new: int, past: int, window: int | None, config: PreTrainedConfig, like: torch.Tensor) -> Any:
        allowed = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
        return ALL_MASK_ATTENTION_FUNCTIONS[self.attention](
            batch_size=1,
            q_length=new,
            kv_length=past + new,
            q_offset=past,
            kv_offset=0,
            mask_function=allowed,
            allow_is_causal_skip=False,
            dtype=like.dtype,
            device=like.device,
            config=config,
        )


def pack_attention(part: Part) -> str:
    """Have the part take packed passes, ``hidden(inputs_embeds=h_1TD, sequences=...)``, and no others.

    Returns:
        The name of the attention it had, for ``Sequences``.
    """
    AttentionInterface.register(NAME, _attend)
    own: str = part.config._attn_implementation
    part.config._attn_implementation = NAME  # transformers makes no masks for an attention it does not know
    return own


def _attend(
    module: Any,
    query_1HTd: torch.Tensor,
    key_1HTd: torch.Tensor,
    value_1HTd: torch.Tensor,
    attention_mask: None,
    *,
    sequences: Sequences,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of all sequences of a pass, ``[1, T, H, d]``."""
    attention = _attention_of(module, sequences.attention)
    window: int | None = settings.get("sliding_window")
    if sequences.even:
        rows, length = len(sequences.lengths), sequences.lengths[0]
        batch = [_rows(states, rows, length) for states in (query_1HTd, key_1HTd, value_1HTd)]
        mask = sequences.mask(length, 0, window, module.config, query_1HTd)
        output_BNHd = attention(module, *batch, mask, **settings)[0]
        return output_BNHd.reshape(1, rows * length, *output_BNHd.shape[2:]), None
    if sequences.kernel is not None:
        states = query_1HTd, key_1HTd, value_1HTd
        return sequences.attend(sequences.kernel, module.layer_idx, states, window, settings.get("scaling")), None
    pieces = []
    split = (torch.split(states, sequences.lengths, dim=2) for states in (query_1HTd, key_1HTd, value_1HTd))
    for number, (query, key, value) in enumerate(zip(*split, strict=True)):
        new, past = query.shape[2], 0
        if sequences.caches is not None:
            cache = sequences.caches[number]
            past = cache.length
            key, value = cache.extend(module.layer_idx, key, value)
            if window is not None and past >= window:  # what no new token can see is left out
                seen = window - 1 + new
                key, value, past = key[:, :, -seen:], value[:, :, -seen:], window - 1
        mask = sequences.mask(new, past, window, module.config, query)
        pieces.append(attention(module, query, key, value, mask, **settings)[0])
    return torch.cat(pieces, dim=1), None


def _attention_of(module: Any, name: str) -> Callable[..., Any]:
    """As the family's own code looks it up: ``eager`` is a function of its modelling file."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return attention


def _rows(states_1HTd: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """The same tokens as a batch, ``[B, H, N, d]``."""
    _, heads, _, width = states_1HTd.shape
    return states_1HTd.view(heads, rows, length, width).transpose(0, 1)
