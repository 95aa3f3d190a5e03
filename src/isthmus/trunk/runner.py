"""The runner: the trunk's blocks applied to packed sequences.

Shapes: T tokens of all sequences one after another, B sequences, D width, P cached positions.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from isthmus.errors import FrameError
from isthmus.model.cut import Part
from isthmus.model.packing import Packing


class Runner:
    """Runs the trunk part. The padded layout it computes in never leaves it."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.width: int = part.config.hidden_size
        self.context: int = part.config.max_position_embeddings
        first = next(part.parameters())
        self.device, self.dtype = first.device, first.dtype

    def whole(self, h_TD: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Sequences from their first token on. Padded on the right, causal attention needs no mask at all."""
        self.check_context(lengths)
        packing = Packing.of_lengths(lengths, self.device, pad_left=False)
        h_BLD = packing.unpack(h_TD.to(self.device, self.dtype))
        return packing.pack(self.part.hidden(inputs_embeds=h_BLD, use_cache=False))

    def continued(
        self, h_TD: torch.Tensor, lengths: list[int], real_BP: torch.Tensor, cache: Cache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequences continued from a KV cache.

        Args:
            real_BP: which of the cached positions are real tokens.
            cache: extended in place. New tokens are padded on the left, so that all rows end together.

        Returns:
            The result ``[T, D]``, and ``real_BP`` with the new positions.
        """
        past_B1 = real_BP.sum(dim=1, keepdim=True)
        self.check_context((past_B1[:, 0] + torch.tensor(lengths, device=self.device)).tolist())
        packing = Packing.of_lengths(lengths, self.device, pad_left=True)
        real = torch.cat([real_BP, packing.real_BL], dim=1)
        h_BLD = self.part.hidden(
            inputs_embeds=packing.unpack(h_TD.to(self.device, self.dtype)),
            attention_mask=None if bool(real.all()) else real.long(),
            position_ids=(past_B1 + packing.real_BL.cumsum(dim=1) - 1).clamp_min(0),
            past_key_values=cache,
            use_cache=True,
        )
        return packing.pack(h_BLD), real

    def check_context(self, lengths: list[int]) -> None:
        """Raise ``FrameError`` if one of these sequences is longer than the model's context."""
        if max(lengths) > self.context:
            raise FrameError(
                f"a sequence of {max(lengths)} tokens, the model's context is {self.context}",
                remedy="shorten the prompt or lower train.max_tokens",
            )
