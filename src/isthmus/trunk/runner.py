"""The runner: applies the trunk's blocks to packed sequences.

Shapes: T tokens of all sequences, concatenated; D the model's width; W width of the hidden states that cross.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from isthmus.errors import FrameError
from isthmus.model.bottleneck import UP, layer_weight, project
from isthmus.model.cut import Part
from isthmus.model.device import CPU
from isthmus.model.rope import by_length, context_length, given_lengths
from isthmus.trunk.attention_kernels import kernel_for
from isthmus.trunk.grouped_lora import Adapter, group_adapters
from isthmus.trunk.packed_attention import AttendingRows, PackedSequences, PastPositions, SequenceCache, pack_attention
from isthmus.trunk.paged_cache import PagedCache, PagePool
from isthmus.trunk.token_passes import TokenPasses, recordable


class Runner:
    """Runs the trunk part on the sequences of many silos in one pass, without padding.

    Args:
        residual: whether results are the difference between the blocks' output and input.
        record: whether to keep caches in pages and to record passes of one token a sequence; None: on CUDA, where the
            part's passes can be recorded.
    """

    def __init__(self, part: Part, *, residual: bool = False, record: bool | None = None) -> None:
        self.part = part
        self._residual = residual
        self._up = layer_weight(part, UP)
        self.width: int = part.config.hidden_size
        self.crossing_width = self.width if self._up is None else self._up.shape[1]
        self.context = context_length(part.config)
        self._by_length = by_length(part.config)
        first = next(part.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.plan = pack_attention(part)
        self._kernel = kernel_for(self.plan, self.device, self.dtype)
        self._groups = group_adapters(part, at_once=self.device.type != "cpu")
        self._pages: PagePool | None = None
        self._token_passes: TokenPasses | None = None
        if record is None:
            record = self.device.type == "cuda" and recordable(part, self.plan)
        if record:
            self._pages = PagePool(self.plan, self.dtype, self.device)
            self._token_passes = TokenPasses(self._compute, self._pages, self.plan, self.crossing_width)

    def full_pass(
        self,
        h_TD: torch.Tensor,
        lengths: list[int],
        segments: list[tuple[int, Adapter]] | None = None,
        masks: Sequence[str | None] = (),
    ) -> torch.Tensor:
        """The blocks' results for whole sequences, from their first token on, ``[T, D]``.

        Args:
            h_TD: hidden states ``[T, W]``.
            lengths: number of tokens of each sequence.
            segments: number of tokens and adapter of each silo; None: the part's own adapter for all.
            masks: key of each segment's dropout masks; None: nothing of it is left out.
        """
        with self._groups.through(segments, self.device, masks):
            return self._run(h_TD, PackedSequences(self.plan, lengths, kernel=self._kernel))

    def cached_pass(
        self,
        h_TD: torch.Tensor,
        lengths: list[int],
        caches: list[SequenceCache],
        ends: list[int | None] | None = None,
    ) -> torch.Tensor:
        """The blocks' results for new tokens of cached sequences, ``[T, D]``. The caches are extended in place.

        Args:
            h_TD: hidden states of the new tokens, ``[T, W]``.
            lengths: number of new tokens of each sequence.
            ends: as in ``PackedSequences``.
        """
        for cache, new in zip(caches, lengths, strict=True):
            cache.reserve(cache.length + new)
        paged = [cache for cache in caches if isinstance(cache, PagedCache)]
        if self._token_passes is not None and max(lengths) == 1 and len(paged) == len(caches):
            return self._token_passes(h_TD, paged)
        sequences = PackedSequences(self.plan, lengths, caches, self._kernel, ends)
        h_TD = self._run(h_TD, sequences)
        sequences.finish()
        return h_TD

    def new_cache(self) -> SequenceCache:
        """An empty cache for one sequence."""
        if self._pages is not None:
            return PagedCache(self._pages)
        return SequenceCache(self.plan, self.context, self.dtype, self.device)

    def check_context(self, lengths: list[int]) -> None:
        """Raise ``FrameError`` if one of these sequences is longer than the model's context."""
        if max(lengths) > self.context:
            raise FrameError(
                f"received a sequence of {max(lengths)} tokens; the model's context is {self.context}",
                remedy="shorten the prompt or lower train.max_tokens",
            )

    def _run(self, h_TW: torch.Tensor, sequences: PackedSequences) -> torch.Tensor:
        with self._lengths_of(sequences):
            return self._compute(h_TW.to(self.device, self.dtype), sequences.positions(self.device), sequences)

    def _lengths_of(self, sequences: PackedSequences) -> AbstractContextManager[None]:
        """Context in which each sequence's own length decides its rotary frequencies."""
        if not self._by_length:
            return nullcontext()
        return given_lengths(sequences.deciding_lengths(), sequences.positions(CPU))

    def _compute(
        self, h_TW: torch.Tensor, positions_1T: torch.Tensor, sequences: PackedSequences | AttendingRows
    ) -> torch.Tensor:
        h_TD = self._widened(h_TW)
        h_1TD = self.part.hidden(
            inputs_embeds=h_TD.unsqueeze(0),
            position_ids=positions_1T,
            past_key_values=PastPositions(positions_1T) if self.part.family.counts_past else None,
            use_cache=False,
            sequences=sequences,
        )
        return h_1TD.squeeze(0) - h_TD if self._residual else h_1TD.squeeze(0)

    def _widened(self, h_TW: torch.Tensor) -> torch.Tensor:
        """Hidden states at the model's width, ``[T, D]``: through the bottleneck's ``up`` of each segment's adapter."""
        if self._up is None or self._groups.segments is None:
            return project(h_TW, self._up)
        pieces = torch.split(h_TW, [tokens for tokens, _ in self._groups.segments])
        ups = [adapter[f"{UP}.weight"] for _, adapter in self._groups.segments]
        return torch.cat([project(piece, up) for piece, up in zip(pieces, ups, strict=True)])
