"""The KV cache of a split model: each part keeps its own, and all are cropped and reordered together."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from isthmus.errors import NotSupportedError
from isthmus.model.cut import Part
from isthmus.model.refusals import CACHE_REFUSALS, refusing
from isthmus.model.transcript import Transcript
from isthmus.privacy.subjects import Subjects


class TrunkSession(Protocol):
    """The silo's handle of its KV cache on the trunk."""

    def subjects(self, rows: list[list[int]] | None, lengths: list[int]) -> Subjects | None:
        """The records that the generation's sequences belong to; None where nothing leaves the silo.

        Args:
            rows: the new token ids of each sequence; None for embeddings.
            lengths: number of new positions of each sequence that cross.
        """

    def crop(self, positions: int) -> None:
        """Drop this many positions from the end of every row, before the next step."""

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order, before the next step."""

    def close(self) -> None:
        """Free the trunk's memory."""


@refusing(CACHE_REFUSALS)
class SplitCache(Cache):
    """The KV cache of a generation: the layers of bottom and top, and the session that holds the trunk's layers.

    Inherited methods act on the silo's layers. Those that change rows or positions change the session as well.
    """

    def __init__(self, bottom: Part, session: TrunkSession, top: Part) -> None:
        self._parts = bottom, top
        self._recording = False
        self.session = session
        self.transcript: Transcript | None = None
        """The hidden states exchanged with the trunk; None until ``start_transcript``."""
        self.real_BP: torch.Tensor | None = None
        """True where a position of bottom's cache holds a real token, false for padding; None while it is empty."""
        self._crossed_BL: torch.Tensor | None = None
        """True where a position of top's cache crossed; None if all did."""
        super().__init__(layers=self._new_layers())

    @property
    def drafted(self) -> bool:
        """Whether the next step's tokens are drafts: each is then computed as if it came alone (``model.rope``)."""
        return bool(getattr(self.bottom, "drafted", False))

    @drafted.setter
    def drafted(self, drafted: bool) -> None:
        for cache in (self.bottom, self.top):
            cache.drafted = drafted

    def restart(self, session: TrunkSession) -> None:
        """Drop all positions of all parts and go on with this new session; the old one is closed."""
        self.session.close()
        self.session, self.layers, self._crossed_BL, self.real_BP = session, self._new_layers(), None, None
        if self._recording:
            super().activate_past_recording()
        if self.transcript is not None:
            self.transcript.crop(len(self.transcript))

    def activate_past_recording(self) -> None:
        """Let all parts drop positions that a sliding window has left behind."""
        self._recording = True
        super().activate_past_recording()

    def _new_layers(self) -> list[Any]:
        self.bottom, self.top = (DynamicCache(config=part.config) for part in self._parts)
        return [*self.bottom.layers, *self.top.layers]

    def belongs_to(self, bottom: Part) -> bool:
        """Whether this is a cache of the model with this bottom."""
        return self._parts[0] is bottom

    def start_transcript(self) -> Transcript:
        """Record all further hidden states exchanged with the trunk. An existing transcript is continued."""
        if self.transcript is None:
            self.transcript = Transcript()
        return self.transcript

    def add_crossed(self, crosses_BL: torch.Tensor) -> torch.Tensor:
        """Append a mask of new positions, true where one crossed.

        Args:
            crosses_BL: ``[B, L]``, the new positions of top's cache.

        Returns:
            The mask of all of top's positions, ``[B, past + L]``.
        """
        if self._crossed_BL is not None:
            crosses_BL = torch.cat([self._crossed_BL, crosses_BL], dim=1)
        self._crossed_BL = crosses_BL
        return crosses_BL

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last positions of every row, in all parts."""
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.session.crop(abs(tokens_to_remove))
            if self._crossed_BL is not None:
                self._crossed_BL = self._crossed_BL[:, : -abs(tokens_to_remove)]
            if self.real_BP is not None:
                self.real_BP = self.real_BP[:, : -abs(tokens_to_remove)]
            if self.transcript is not None:
                self.transcript.crop(abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep these rows, in this order, in all parts."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows with these indices, or where a bool mask is true, in all parts."""
        super().batch_select_indices(indices)
        rows = indices.nonzero().flatten() if indices.dtype is torch.bool else indices
        self._select(rows.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row this many times, in all parts."""
        rows = self.layers[0].keys.shape[0] if self.get_seq_length() else 0
        super().batch_repeat_interleave(repeats)
        if rows:
            self._select([row for row in range(rows) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        self.session.select(rows)
        if self._crossed_BL is not None:
            self._crossed_BL = self._crossed_BL[rows]
        if self.real_BP is not None:
            self.real_BP = self.real_BP[rows]
        if self.transcript is not None:
            self.transcript.select(rows)


def without_gradient(g_TD: torch.Tensor) -> torch.Tensor:
    """The trunk's answer to a pass with a cache: a backward through it raises ``NotSupportedError``."""
    if not torch.is_grad_enabled():
        return g_TD
    answer: torch.Tensor = _CachedAnswer.apply(g_TD, torch.zeros((), requires_grad=True))  # type: ignore[no-untyped-call]
    return answer


class _CachedAnswer(torch.autograd.Function):
    """Returns its first argument. The trunk keeps no graph of a session, so that there is no gradient to ask it for."""

    @staticmethod
    def forward(ctx: Any, g_TD: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return g_TD.view_as(g_TD)

    @staticmethod
    def backward(ctx: Any, gradient_TD: torch.Tensor) -> tuple[torch.Tensor, None]:
        raise NotSupportedError(
            "a pass with a cache has no gradient: the trunk keeps the cache, and not the graph",
            remedy="pass use_cache=False in training",
        )
