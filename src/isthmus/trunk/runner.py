"""The runner: applies the trunk's blocks to packed sequences, each of which passes all of them or a part.

Shapes: T tokens of all sequences, concatenated; D the model's width; W width of the hidden states that cross.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate

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
from isthmus.trunk.stretches import stretches_of
from isthmus.trunk.token_passes import TokenPasses, recordable


class Runner:
    """Runs the trunk part on the sequences of many silos in one pass, without padding.

    Args:
        residual: whether results are the difference between the blocks' output and input.
        record: whether to keep caches in pages and to record passes of one token a sequence; None: on CUDA, where the
            part's passes can be recorded.
        passed: the blocks that each silo's sequences pass, by their indices in the part; of other silos all.
    """

    def __init__(
        self,
        part: Part,
        *,
        residual: bool = False,
        record: bool | None = None,
        passed: Mapping[str, range] | None = None,
    ) -> None:
        self.part = part
        self._residual = residual
        self._passed = dict(passed or {})
        self._up = layer_weight(part, UP)
        self.width: int = part.config.hidden_size
        self.crossing_width = self.width if self._up is None else self._up.shape[1]
        self.context = context_length(part.config)
        self._by_length = by_length(part.config)
        first = next(part.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.plan = pack_attention(part)
        self._all = range(len(self.plan.rules))
        self._stretches: dict[range, Part] = {self._all: part}
        self._kernel = kernel_for(self.plan, self.device, self.dtype)
        self._groups = group_adapters(part, at_once=self.device.type != "cpu")
        self._pages: PagePool | None = None
        self._token_passes: dict[range, TokenPasses] = {}
        """By the blocks that their sequences pass."""
        self.bytes_elsewhere = 0
        """What the graph of the last pass takes in other processes."""
        if record is None:
            record = self.device.type == "cuda" and recordable(part, self.plan)
        if record:
            self._pages = PagePool(self.plan, self.dtype, self.device)

    def passed(self, silo: str) -> range:
        """The blocks that this silo's sequences pass, by their indices in the part."""
        return self._passed.get(silo, self._all)

    def full_pass(
        self,
        h_TD: torch.Tensor,
        lengths: list[int],
        segments: list[tuple[int, Adapter]] | None = None,
        masks: Sequence[str | None] = (),
        passed: Sequence[range] = (),
    ) -> torch.Tensor:
        """The blocks' results for whole sequences, from their first token on, ``[T, D]``.

        Args:
            h_TD: hidden states ``[T, W]``.
            lengths: number of tokens of each sequence.
            segments: number of tokens and adapter of each silo; None: the part's own adapter for all.
            masks: key of each segment's dropout masks; None: nothing of it is left out.
            passed: blocks that each sequence passes; by default all. A segment's sequences pass the same.
        """
        if set(passed) <= {self._all}:
            with self._groups.through(segments, self.device, masks):
                return self._run(h_TD, PackedSequences(self.plan, lengths, kernel=self._kernel))

        def pass_rows(part: Part, h_TD: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
            sequences = PackedSequences(self.plan, [lengths[row] for row in rows], kernel=self._kernel)
            chosen = range(0) if segments is None else _segments_of(lengths, segments, rows)
            own = None if segments is None else [segments[number] for number in chosen]
            with self._groups.through(own, self.device, [masks[number] for number in chosen] if masks else ()):
                return self._blocks(part, h_TD, sequences)

        return self._in_stretches(h_TD, lengths, passed, pass_rows)

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
        if max(lengths) == 1 and len(paged) == len(caches):
            return self._one_token_each(h_TD, paged)
        passed = [cache.blocks for cache in caches]
        if set(passed) == {self._all}:
            sequences = PackedSequences(self.plan, lengths, caches, self._kernel, ends)
            h_TD = self._run(h_TD, sequences)
            sequences.finish()
            return h_TD

        def pass_rows(part: Part, h_TD: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
            own, theirs = [lengths[row] for row in rows], [caches[row] for row in rows]
            until = None if ends is None else [ends[row] for row in rows]
            sequences = PackedSequences(self.plan, own, theirs, self._kernel, until)
            h_TD = self._blocks(part, h_TD, sequences)
            sequences.store()
            return h_TD

        h_TD = self._in_stretches(h_TD, lengths, passed, pass_rows)
        for cache, new in zip(caches, lengths, strict=True):
            cache.length += new
        return h_TD

    def new_cache(self, silo: str = "") -> SequenceCache:
        """An empty cache for one sequence of this silo."""
        return self.cache_of(self.passed(silo))

    def cache_of(self, blocks: range) -> SequenceCache:
        """An empty cache for one sequence that passes these blocks."""
        if self._pages is not None:
            return PagedCache(self._pages, blocks)
        return SequenceCache(self.plan, self.context, self.dtype, self.device, blocks)

    def check_context(self, lengths: list[int]) -> None:
        """Raise ``FrameError`` if one of these sequences is longer than the model's context."""
        if max(lengths) > self.context:
            raise FrameError(
                f"received a sequence of {max(lengths)} tokens; the model's context is {self.context}",
                remedy="shorten the prompt or lower train.max_tokens",
            )

    def _in_stretches(
        self,
        h_TD: torch.Tensor,
        lengths: list[int],
        passed: Sequence[range],
        pass_rows: Callable[[Part, torch.Tensor, Sequence[int]], torch.Tensor],
    ) -> torch.Tensor:
        """The results of sequences that pass different blocks, ``[T, D]``: one packed pass for each stretch of blocks.

        Args:
            pass_rows: a stretch's result for the hidden states of the sequences with these indices, concatenated.
        """
        h_TD = h_TD.to(self.device, self.dtype)
        pieces = list(torch.split(h_TD, lengths))
        for stretch in stretches_of(passed):
            h_SD = torch.cat([pieces[row] for row in stretch.rows])
            h_SD = pass_rows(self._stretch(stretch.blocks), h_SD, stretch.rows)
            sizes = [lengths[row] for row in stretch.rows]
            for row, piece in zip(stretch.rows, torch.split(h_SD, sizes), strict=True):
                pieces[row] = piece
        g_TD = torch.cat(pieces)
        return g_TD - h_TD if self._residual else g_TD

    def _one_token_each(self, h_TD: torch.Tensor, caches: list[PagedCache]) -> torch.Tensor:
        """A recorded pass of the sequences that pass the same blocks, after one another; ``[T, D]``."""
        results = list(torch.split(h_TD, 1))
        for blocks in dict.fromkeys(cache.blocks for cache in caches):
            rows = [row for row, cache in enumerate(caches) if cache.blocks == blocks]
            if len(rows) == len(caches):
                return self._recorded(blocks)(h_TD, caches)
            g_SD = self._recorded(blocks)(h_TD[rows], [caches[row] for row in rows])
            for row, piece in zip(rows, torch.split(g_SD, 1), strict=True):
                results[row] = piece
        return torch.cat(results)

    def _recorded(self, blocks: range) -> TokenPasses:
        if blocks not in self._token_passes:
            assert self._pages is not None
            compute = partial(self._compute, part=self._stretch(blocks))
            self._token_passes[blocks] = TokenPasses(compute, self._pages, self.plan, self.crossing_width)
        return self._token_passes[blocks]

    def _stretch(self, blocks: range) -> Part:
        """These blocks of the part, which share its modules."""
        if blocks not in self._stretches:
            self._stretches[blocks] = self.part.stretch(blocks)
        return self._stretches[blocks]

    def _blocks(self, part: Part, h_TD: torch.Tensor, sequences: PackedSequences) -> torch.Tensor:
        """The results of these blocks for hidden states of the model's width, ``[T, D]``."""
        with self._lengths_of(sequences):
            return self._through(part, h_TD, sequences.positions(self.device), sequences)

    def _run(self, h_TW: torch.Tensor, sequences: PackedSequences) -> torch.Tensor:
        with self._lengths_of(sequences):
            return self._compute(h_TW.to(self.device, self.dtype), sequences.positions(self.device), sequences)

    def _lengths_of(self, sequences: PackedSequences) -> AbstractContextManager[None]:
        """Context in which each sequence's own length decides its rotary frequencies."""
        if not self._by_length:
            return nullcontext()
        return given_lengths(sequences.deciding_lengths(), sequences.positions(CPU))

    def _compute(
        self,
        h_TW: torch.Tensor,
        positions_1T: torch.Tensor,
        sequences: PackedSequences | AttendingRows,
        part: Part | None = None,
    ) -> torch.Tensor:
        h_TD = self._widened(h_TW)
        g_TD = self._through(part or self.part, h_TD, positions_1T, sequences)
        return g_TD - h_TD if self._residual else g_TD

    def _through(
        self, part: Part, h_TD: torch.Tensor, positions_1T: torch.Tensor, sequences: PackedSequences | AttendingRows
    ) -> torch.Tensor:
        h_1TD = part.hidden(
            inputs_embeds=h_TD.unsqueeze(0),
            position_ids=positions_1T,
            past_key_values=PastPositions(positions_1T) if part.family.counts_past else None,
            use_cache=False,
            sequences=sequences,
        )
        return h_1TD.squeeze(0)

    def _widened(self, h_TW: torch.Tensor) -> torch.Tensor:
        """Hidden states at the model's width, ``[T, D]``: through the bottleneck's ``up`` of each segment's adapter."""
        if self._up is None or self._groups.segments is None:
            return project(h_TW, self._up)
        pieces = torch.split(h_TW, [tokens for tokens, _ in self._groups.segments])
        ups = [adapter[f"{UP}.weight"] for _, adapter in self._groups.segments]
        return torch.cat([project(piece, up) for piece, up in zip(pieces, ups, strict=True)])


def _segments_of(lengths: list[int], segments: list[tuple[int, Adapter]], rows: Sequence[int]) -> list[int]:
    """Indices of the segments that these sequences are of."""
    ends = list(accumulate(lengths))
    starts = list(accumulate([0, *(tokens for tokens, _ in segments)]))
    own = {ends[row] - lengths[row] for row in rows}
    return [number for number in range(len(segments)) if starts[number] in own]
