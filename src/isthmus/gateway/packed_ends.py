"""A silo's bottom and top for many sequences at once: one packed pass of each, without padding.

All layers but attention treat tokens independently, so the trunk's packed pass (``trunk.runner``) serves the ends, too:
each sequence has KV caches of its own, joins and leaves by being named, and gets what it gets alone, but for the last
bits.

Shapes: L new tokens of one sequence, T those of all, D the model's width, K positions that are scored, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from isthmus.model.cut import Part
from isthmus.model.split import SplitForCausalLM
from isthmus.trunk.packed_attention import SequenceCache
from isthmus.trunk.runner import Runner


@dataclass
class EndCaches:
    """The KV caches of one sequence in the silo."""

    bottom: SequenceCache
    top: SequenceCache

    def copy(self) -> EndCaches:
        """An independent copy."""
        return EndCaches(self.bottom.copy(), self.top.copy())

    def crop(self, tokens: int) -> None:
        """Drop this many positions from the end."""
        for cache in (self.bottom, self.top):
            cache.crop(cache.length - tokens)


@dataclass(frozen=True)
class NewTokens:
    """The next tokens of one sequence."""

    ids: list[int]
    caches: EndCaches
    drafted: bool = False
    """Whether each is computed as if it came alone (``model.rope``)."""


class _ScoringTop(Part):
    """Top whose result is the logits at some positions."""

    kept: torch.Tensor | int = 0
    """Indices, in the pass, of the positions that are scored; 0: all."""

    def hidden(self, **inputs: object) -> torch.Tensor:
        """Logits, ``[1, K, V]``; arguments as of the family's backbone."""
        return self.model(logits_to_keep=self.kept, **inputs).logits  # type: ignore[no-any-return]


class PackedEnds:
    """Runs bottom and top of a split model on the new tokens of many sequences.

    The model itself stays as it is: the passes have modules of their own that share its weights.
    """

    def __init__(self, model: SplitForCausalLM) -> None:
        top = _twin(model.top)
        self._scoring = _ScoringTop(top.name, top.model, top.family, top.first_block, top.whole)
        self._bottom = Runner(_twin(model.bottom), record=False)
        self._top = Runner(self._scoring, record=False)
        self._embedding = model.get_input_embeddings()
        self.device = self._bottom.device

    def new_caches(self) -> EndCaches:
        """Empty caches for one sequence."""
        return EndCaches(self._bottom.new_cache(), self._top.new_cache())

    @torch.no_grad()
    def through_bottom(self, sequences: Sequence[NewTokens]) -> list[torch.Tensor]:
        """Bottom's output at each sequence's new tokens, ``[L, D]``. The caches are extended."""
        lengths = [len(one.ids) for one in sequences]
        ids_1T = torch.tensor([[token for one in sequences for token in one.ids]], device=self.device)
        caches = [one.caches.bottom for one in sequences]
        h_TD = self._bottom.cached_pass(self._embedding(ids_1T)[0], lengths, caches, _ends(sequences, caches, lengths))
        return list(torch.split(h_TD, lengths))

    @torch.no_grad()
    def through_top(
        self, g_LDs: Sequence[torch.Tensor], sequences: Sequence[NewTokens], scored: Sequence[int]
    ) -> list[torch.Tensor]:
        """Logits at the last positions of each sequence, ``[K, V]``. The caches are extended.

        Args:
            g_LDs: top's input at each sequence's new positions.
            scored: number of each sequence's last positions that are scored.
        """
        lengths = [len(g_LD) for g_LD in g_LDs]
        caches = [one.caches.top for one in sequences]
        ends_T = torch.tensor(lengths).cumsum(dim=0).tolist()
        kept = [range(end - count, end) for end, count in zip(ends_T, scored, strict=True)]
        self._scoring.kept = torch.tensor([place for places in kept for place in places], device=self.device)
        logits_KV = self._top.cached_pass(torch.cat(list(g_LDs)), lengths, caches, _ends(sequences, caches, lengths))
        return list(torch.split(logits_KV, list(scored)))


def _ends(sequences: Sequence[NewTokens], caches: list[SequenceCache], lengths: list[int]) -> list[int | None]:
    """The length that decides each sequence's rotary frequencies: its own at the end of the pass; of drafts None."""
    ends = zip(sequences, caches, lengths, strict=True)
    return [None if one.drafted else cache.length + new for one, cache, new in ends]


def _twin(part: Part) -> Part:
    """A part with modules of its own and the same tensors, whose attention can be switched by itself."""
    known: dict[int, Any] = {id(one): one for one in (*part.parameters(), *part.buffers(), part.family, part.whole)}
    return copy.deepcopy(part, known)
