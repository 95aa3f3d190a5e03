"""Packed attention: a pass over many concatenated sequences, each of which attends to itself and its own cache.

All layers but attention treat tokens independently, so sequences of any lengths and silos share a pass without padding.
Attention is the family's own, called once for each sequence; on an accelerator one kernel computes all sequences.

Shapes: T new tokens of all sequences, S visible positions of all sequences, N new tokens of one sequence, P positions
in one sequence's cache, H heads, K heads of keys and values, R rows of all heads that share one of those, V positions
that one sequence's new tokens see, d width of a head, L blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from isthmus.model.cut import Part
from isthmus.trunk.attention_kernels import Kernel, PackedLayout
from isthmus.trunk.attention_plan import AttentionPlan, MaskRule, plan_attention

PACKED_ATTENTION = "isthmus_packed"
"""The name under which packed attention is registered with transformers."""
INITIAL_ROOM = 64
"""Number of positions for which a new cache allocates room; the room doubles when it is full."""
FEW_NEW = 32
"""New tokens of a sequence, such as drafted ones, up to which heads that share keys and values are computed together:
their mask, which is repeated for each, then is smaller than the keys and values, which otherwise are."""


class SequenceCache:
    """The KV cache of one sequence: keys and values of its blocks, both with room for the wider of the two.

    Args:
        limit: the most positions that a sequence has.
        blocks: the part's blocks that the sequence passes, by their indices in the part; None: all.
    """

    def __init__(
        self,
        plan: AttentionPlan,
        limit: int,
        dtype: torch.dtype,
        device: torch.device,
        blocks: range | None = None,
    ) -> None:
        self.blocks = range(len(plan.rules)) if blocks is None else blocks
        self.first = self.blocks.start
        """The first block that the cache has room for."""
        self._shape = (len(self.blocks), 2, 1, plan.heads)
        self._counted = len(self.blocks)
        """Number of blocks whose bytes are counted."""
        self._widths = plan.key_width, plan.value_width
        self._kv = torch.empty(*self._shape, 0, max(self._widths), dtype=dtype, device=device)
        self._limit = limit
        self.length = 0
        """Number of cached positions."""

    @property
    def nbytes(self) -> int:
        """Bytes of allocated memory, unused room included."""
        return self._bytes(self._kv.shape[-2])

    def bytes_for(self, length: int) -> int:
        """Bytes that this cache would allocate for this many positions."""
        return self._bytes(self._room(length))

    def _bytes(self, room: int) -> int:
        _, two, one, heads = self._shape
        values: int = self._counted * two * one * heads * room * self._kv.shape[-1]
        return values * self._kv.element_size()

    def reserve(self, length: int) -> None:
        """Allocate room for this many positions."""
        room = self._room(length)
        if room > self._kv.shape[-2]:
            grown = self._kv.new_empty(*self._shape, room, self._kv.shape[-1])
            grown[..., : self.length, :] = self._kv[..., : self.length, :]
            self._kv = grown

    def extend(self, block: int, key_1HNd: torch.Tensor, value_1HNd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one block's new keys and values after the cached ones, and return all of them, ``[1, H, P + N, d]``
        each.

        They become part of the cache when ``length`` is raised, after the last block.
        """
        end = self.length + key_1HNd.shape[2]
        keys, values = (
            states[..., :width] for states, width in zip(self._kv[block - self.first], self._widths, strict=True)
        )
        keys[:, :, self.length : end] = key_1HNd
        values[:, :, self.length : end] = value_1HNd
        return keys[:, :, :end], values[:, :, :end]

    def since(self, start: int) -> tuple[torch.Tensor, ...]:
        """Keys and values from this position on of each block from ``first`` on, ``[2, H, P - start, d]``."""
        return self._kv[:, :, 0, :, start : self.length].unbind(0)

    def append(self, kv_L2HNd: torch.Tensor, block: int) -> None:
        """Write the new keys and values of all blocks from this one on after the cached ones. They become part of the
        cache when ``length`` is raised."""
        place = slice(block - self.first, block - self.first + len(kv_L2HNd))
        self._kv[place, :, 0, :, self.length : self.length + kv_L2HNd.shape[-2]] = kv_L2HNd

    def crop(self, length: int) -> None:
        """Drop all positions from this one on."""
        self.length = min(self.length, length)

    def copy(self) -> SequenceCache:
        """An independent copy."""
        twin = object.__new__(type(self))
        twin.__dict__ |= self.__dict__
        twin._kv = self._kv.clone()
        return twin

    def _room(self, length: int) -> int:
        room = max(self._kv.shape[-2], INITIAL_ROOM)
        while room < length:
            room *= 2
        return max(length, min(room, self._limit))


class PastPositions:
    """In place of a cache, for families whose attention asks it for the number of earlier positions.

    Args:
        position_1T: position of each token within its sequence.
    """

    def __init__(self, position_1T: torch.Tensor) -> None:
        self._before_T = position_1T[0] - torch.arange(position_1T.shape[1], device=position_1T.device)

    def get_seq_length(self, _: int = 0) -> torch.Tensor:
        """The number that makes a token's index in the pass its position, ``[T]``."""
        return self._before_T

    def update(self, key: torch.Tensor, value: torch.Tensor, _: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as they are: packed attention caches them."""
        return key, value


class PackedSequences:
    """The sequences of one packed pass.

    Args:
        plan: the attention of the part's blocks.
        lengths: number of new tokens of each sequence.
        caches: cache of each sequence; None: every sequence starts at position 0 and is not cached.
        kernel: computes the attention of several sequences in one call; None: one call for each sequence.
        ends: length of each sequence at the end of its step, of which a pass may compute a chunk; None for one whose
            tokens are computed as if each came alone. By default the length at the end of the pass.
    """

    def __init__(
        self,
        plan: AttentionPlan,
        lengths: list[int],
        caches: list[SequenceCache] | None = None,
        kernel: Kernel | None = None,
        ends: list[int | None] | None = None,
    ) -> None:
        self.plan = plan
        self._ends = ends
        self.lengths = lengths
        self.caches = caches
        self.kernel = kernel if len(lengths) > 1 else None
        self._masks: dict[tuple[int, int, MaskRule], torch.Tensor | None] = {}
        self._layouts: dict[int | None, tuple[PackedLayout, list[tuple[torch.Tensor, ...]]]] = {}
        self._fresh: list[torch.Tensor] = []
        """New keys and values of each block that the kernel has computed, ``[2, H, T, d]``, not yet cached."""
        self._first = 0
        """The first of these blocks."""

    @property
    def even(self) -> bool:
        """Whether the pass is a plain batch: all sequences of one length and without caches."""
        return self.caches is None and len(set(self.lengths)) == 1

    def positions(self, device: torch.device) -> torch.Tensor:
        """Position of each token within its sequence, ``[1, T]``."""
        pieces = [torch.arange(past, past + new) for past, new in zip(self._past, self.lengths, strict=True)]
        return torch.cat(pieces).unsqueeze(0).to(device)

    def deciding_lengths(self) -> torch.Tensor:
        """The length that decides each token's rotary frequencies (see ``model.rope``), ``[1, T]``."""
        reached = [past + new for past, new in zip(self._past, self.lengths, strict=True)]
        sequences = zip(self._past, reached, self._ends or reached, strict=True)
        pieces = [
            torch.arange(past + 1, end + 1) if decides is None else torch.full((end - past,), decides)
            for past, end, decides in sequences
        ]
        return torch.cat(pieces).unsqueeze(0)

    def attend(
        self,
        kernel: Kernel,
        block: int,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        window: int | None,
        scale: float | None,
    ) -> torch.Tensor:
        """The attention of all sequences in one call, ``[1, T, H, d]``. The caches get the new positions in ``finish``.

        Args:
            states: queries, keys and values of the new tokens, ``[1, H, T, d]``.
        """
        query_1HTd, key_1HTd, value_1HTd = states
        layout, past = self._layout(window, query_1HTd.device)
        if not past:
            return kernel(query_1HTd, key_1HTd, value_1HTd, layout, scale)
        fresh_2HTd = torch.cat((key_1HTd, value_1HTd))
        self._first = self._first if self._fresh else block
        self._fresh.append(fresh_2HTd)
        new = torch.split(fresh_2HTd, self.lengths, dim=-2)
        assert self.caches is not None
        pieces = [
            piece
            for cache, cached, own in zip(self.caches, past, new, strict=True)
            for piece in (cached[block - cache.first], own)
        ]
        key_1HSd, value_1HSd = torch.cat(pieces, dim=-2).chunk(2)
        return kernel(query_1HTd, key_1HSd, value_1HSd, layout, scale)

    def finish(self) -> None:
        """Add the new positions to the caches, after the last block."""
        self.store()
        for cache, new in zip(self.caches or (), self.lengths, strict=False):
            cache.length += new

    def store(self) -> None:
        """Write what the kernel has computed into the caches, whose sequences may still pass other blocks."""
        if self.caches is None:
            return
        pieces = torch.split(torch.stack(self._fresh), self.lengths, dim=-2) if self._fresh else ()
        for cache, kv_L2HNd in zip(self.caches, pieces, strict=False):
            cache.append(kv_L2HNd, self._first)

    def mask(self, new: int, past: int, rule: MaskRule, config: PreTrainedConfig, like: torch.Tensor) -> Any:
        """The mask of ``new`` tokens after ``past`` cached positions, in the format of the part's own attention; None
        where that needs none. Computed once for each pass."""
        key = (new, past, rule)
        if key not in self._masks:
            inside = rule.window is None or past + new <= rule.window
            causal = past == 0 and inside and self.plan.attention == "sdpa"
            needless = rule.plain and (new == 1 or causal)
            self._masks[key] = None if needless else self._make_mask(new, past, rule, config, like)
        return self._masks[key]

    @property
    def _past(self) -> list[int]:
        return [cache.length for cache in self.caches] if self.caches else [0] * len(self.lengths)

    def _layout(self, window: int | None, device: torch.device) -> tuple[PackedLayout, list[tuple[torch.Tensor, ...]]]:
        """The layout of the pass, and each sequence's cached keys and values that a new token can attend to. Computed
        once for each pass."""
        if window not in self._layouts:
            starts = [0 if window is None else max(0, past - window + 1) for past in self._past]
            seen = [past - start + new for past, start, new in zip(self._past, starts, self.lengths, strict=True)]
            cached = [cache.since(start) for cache, start in zip(self.caches or (), starts, strict=False)]
            self._layouts[window] = PackedLayout(self.lengths, seen, window, device), cached
        return self._layouts[window]

    def _make_mask(self, new: int, past: int, rule: MaskRule, config: PreTrainedConfig, like: torch.Tensor) -> Any:
        return ALL_MASK_ATTENTION_FUNCTIONS[self.plan.attention](
            batch_size=1,
            q_length=new,
            kv_length=past + new,
            q_offset=past,
            kv_offset=0,
            mask_function=rule.allowed,
            allow_is_causal_skip=False,
            dtype=like.dtype,
            device=like.device,
            config=config,
        )


class AttendingRows(Protocol):
    """The rows of a pass that compute their attention themselves (``trunk.token_passes``)."""

    def attend_rows(
        self, module: Any, states: tuple[torch.Tensor, torch.Tensor, torch.Tensor], settings: dict[str, Any]
    ) -> torch.Tensor:
        """The attention of all rows, ``[1, T, H, d]``.

        Args:
            module: the block's attention.
            states: queries, keys and values of the new tokens, ``[1, H, T, d]``.
            settings: keyword arguments of the attention function, such as ``scaling``.
        """
        ...


def pack_attention(part: Part) -> AttentionPlan:
    """Switch the part to packed attention: from then on it takes ``hidden(inputs_embeds=h_1TD, sequences=...)`` only.

    Returns:
        The plan of the part's attention, for ``PackedSequences``.

    Raises:
        ModelError: the part's attention cannot be packed.
    """
    plan = plan_attention(part)
    AttentionInterface.register(PACKED_ATTENTION, _attend)
    part.config._attn_implementation = PACKED_ATTENTION  # transformers builds no masks for this name
    return plan


def _attend(
    module: Any,
    query_1HTd: torch.Tensor,
    key_1HTd: torch.Tensor,
    value_1HTd: torch.Tensor,
    attention_mask: None,
    *,
    sequences: PackedSequences | AttendingRows,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of all sequences of a pass, ``[1, T, H, d]``; registered as ``PACKED_ATTENTION``."""
    if not isinstance(sequences, PackedSequences):
        return sequences.attend_rows(module, (query_1HTd, key_1HTd, value_1HTd), settings), None
    attention = _attention_of(module, sequences.plan.attention)
    rule = sequences.plan.rules[module.layer_idx]
    window = rule.window
    if sequences.even:
        rows, length = len(sequences.lengths), sequences.lengths[0]
        batch = [_rows(states, rows, length) for states in (query_1HTd, key_1HTd, value_1HTd)]
        mask = sequences.mask(length, 0, rule, module.config, query_1HTd)
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
            if window is not None and past >= window:  # leave out positions outside every new token's window
                seen = window - 1 + new
                key, value, past = key[:, :, -seen:], value[:, :, -seen:], window - 1
        mask = sequences.mask(new, past, rule, module.config, query)
        few = mask is not None and new <= FEW_NEW and query.shape[1] > key.shape[1]
        if few and attention is sdpa_attention_forward and not settings.get("dropout"):
            pieces.append(attend_by_groups(query, key, value, mask, settings.get("scaling")))
        else:
            pieces.append(attention(module, query, key, value, mask, **settings)[0])
    return torch.cat(pieces, dim=1), None


def attend_by_groups(
    query_1HNd: torch.Tensor,
    key_1KVd: torch.Tensor,
    value_1KVd: torch.Tensor,
    mask_11NV: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of a few tokens, ``[1, N, H, d]``, whose H heads share K heads of keys and values: the heads of a group
    are rows of one head, so that no keys and values are copied for each."""
    _, heads, new, width = query_1HNd.shape
    groups = key_1KVd.shape[1]
    query_1KRd = query_1HNd.reshape(1, groups, -1, width)
    mask_11RV = mask_11NV.repeat(1, 1, heads // groups, 1)
    output_1KRd = scaled_dot_product_attention(query_1KRd, key_1KVd, value_1KVd, mask_11RV, scale=scaling)
    return output_1KRd.reshape(1, heads, new, -1).transpose(1, 2)


def _attention_of(module: Any, name: str) -> Callable[..., Any]:
    """The attention function of this name, as the family looks it up: ``eager`` is in its modelling file."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return attention


def _rows(states_1HTd: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Concatenated sequences of equal length as a batch, ``[B, H, N, d]``."""
    _, heads, _, width = states_1HTd.shape
    return states_1HTd.view(heads, rows, length, width).transpose(0, 1)
