"""The runner: applies the trunk's blocks to packed sequences.

Shapes: T tokens of all sequences, concatenated; D the model's width; W width of the hidden states that cross.
"""

from __future__ import annotations

import torch

from isthmus.errors import FrameError
from isthmus.model.bottleneck import UP, layer_weight, project
from isthmus.model.cut import Part
from isthmus.trunk.attention_kernels import kernel_for
from isthmus.trunk.grouped_lora import Adapter, group_adapters
from isthmus.trunk.packed_attention import PackedSequences, SequenceCache, pack_attention


class Runner:
    """Runs the trunk part on the sequences of many silos in one pass, without padding.

    Args:
        residual: whether results are the difference between the blocks' output and input.
    """

    def __init__(self, part: Part, *, residual: bool = False) -> None:
        self.part = part
        self._residual = residual
        self._up = layer_weight(part, UP)
        self.width: int = part.config.hidden_size
        self.crossing_width = self.width if self._up is None else self._up.shape[1]
        self.context: int = part.config.max_position_embeddings
        first = next(part.parameters())
        self.device, self.dtype = first.device, first.dtype
        self._plan = pack_attention(part)
        self._kernel = kernel_for(self._plan, self.device, self.dtype)
        self._groups = group_adapters(part, at_once=self.device.type != "cpu")

    def full_pass(
        self, h_TD: torch.Tensor, lengths: list[int], segments: list[tuple[int, Adapter]] | None = None
    ) -> torch.Tensor:
        """The blocks' results for whole sequences, from their first token on, ``[T, D]``.

        Args:
            h_TD: hidden states ``[T, W]``.
            lengths: number of tokens of each sequence.
            segments: number of tokens and adapter of each silo; None: the part's own adapter for all.
        """
        with self._groups.through(segments, self.device):
            return self._run(h_TD, PackedSequences(self._plan, lengths, kernel=self._kernel))

    def cached_pass(self, h_TD: torch.Tensor, lengths: list[int], caches: list[SequenceCache]) -> torch.Tensor:
        """The blocks' results for new tokens of cached sequences, ``[T, D]``. The caches are extended in place.

        Args:
            h_TD: hidden states of the new tokens, ``[T, W]``.
            lengths: number of new tokens of each sequence.
        """
        for cache, new in zip(caches, lengths, strict=True):
            cache.reserve(cache.length + new)
        sequences = PackedSequences(self._plan, lengths, caches, self._kernel)
        h_TD = self._run(h_TD, sequences)
        sequences.finish()
        return h_TD

    def new_cache(self) -> SequenceCache:
        """An empty cache for one sequence."""
        return SequenceCache(self._plan, self.context, self.dtype, self.device)

    def check_context(self, lengths: list[int]) -> None:
        """Raise ``FrameError`` if one of these sequences is longer than the model's context."""
        if max(lengths) > self.context:
            raise FrameError(
                f"received a sequence of {max(lengths)} tokens; the model's context is {self.context}",
                remedy="shorten the prompt or lower train.max_tokens",
            )

    def _run(self, h_TD: torch.Tensor, sequences: PackedSequences) -> torch.Tensor:
        h_TD = self._widened(h_TD.to(self.device, self.dtype))
        h_1TD = self.part.hidden(
            inputs_embeds=h_TD.unsqueeze(0),
            position_ids=sequences.positions(self.device),
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
