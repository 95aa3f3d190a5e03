"""How far drafted tokens go.

Drafts never change what is generated. They must not leave the model's context, which the trunk refuses. And where what
a token gets depends on the length of its sequence (``model.rope``), a pass has one KV cache: all its tokens must be
such that plain decoding, token by token, would compute them with that cache.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.candidate_generator import CandidateGenerator

from isthmus.model.cache import SplitCache


class BoundedCandidates(CandidateGenerator):
    """Passes on another generator's drafts as far as they may go.

    Args:
        inner: the generator whose drafts are passed on.
        context: largest number of tokens of a sequence.
        padding: number of the row's padding tokens.
    """

    def __init__(self, inner: CandidateGenerator, context: int, padding: int) -> None:
        self._inner = inner
        self._context = context
        self._padding = padding
        self.requires_model_outputs = inner.requires_model_outputs
        self.model_kwargs_overrides = getattr(inner, "model_kwargs_overrides", {})

    def get_candidates(self, input_ids: torch.Tensor, **known: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The text so far with drafted tokens appended, ``[1, L + drafted]``, and their logits or None."""
        ids, logits = self._inner.get_candidates(input_ids, **known)
        length = input_ids.shape[1]
        drafted = self._allowed(length - self._padding, ids.shape[1] - length)
        return ids[:, : length + drafted], None if logits is None or not drafted else logits[:, :drafted]

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: Any, num_matches: int) -> None:
        """Tell the other generator how many drafts were right."""
        self._inner.update_candidate_strategy(input_ids, scores, num_matches)

    def _allowed(self, length: int, drafted: int) -> int:
        """How many of the drafted tokens may follow a text of this many tokens."""
        return max(0, min(drafted, self._context - length))


class CandidatesByLength(BoundedCandidates):
    """Where a token depends on the length of its sequence. The cache is told that the next step has drafts.

    None follow a prompt in its own step: the prompt's length decides the prompt's frequencies. None go beyond the
    length at which the cache is dropped, unless the text is there already.

    Args:
        inner, context, padding: as in ``BoundedCandidates``.
        cache: the generation's cache.
        switch: the length after which plain decoding drops the cache (``rope.recomputed_after``); None: never.
    """

    def __init__(
        self, inner: CandidateGenerator, context: int, padding: int, cache: SplitCache, switch: int | None
    ) -> None:
        super().__init__(inner, context, padding)
        self._cache = cache
        self._switch = switch

    def _allowed(self, length: int, drafted: int) -> int:
        allowed = super()._allowed(length, drafted) if self._cache.get_seq_length() else 0
        if self._switch is not None and length <= self._switch:
            allowed = min(allowed, self._switch - length)
        self._cache.drafted = allowed > 0
        return allowed
