"""KV caches in pages of one allocation, whose address a recorded pass can rely on (``trunk.token_passes``).

Sequences of any length share the pages, as in vLLM (Kwon et al. 2023).

Shapes: L blocks, C pages, P positions in a page, G heads of keys and values, d width of a head, H as in
``packed_attention``.
"""

from __future__ import annotations

import weakref

import torch

from isthmus.trunk.attention_plan import AttentionPlan
from isthmus.trunk.packed_attention import SequenceCache

PAGE = 64
"""Positions in a page."""
FIRST_PAGES = 64
"""Pages of a new pool; it doubles when all are taken."""
SCRATCH = 0
"""The page that rows without a sequence write to."""


class PagePool:
    """The pages of all sequences of a trunk, whose keys are as wide as their values."""

    def __init__(self, plan: AttentionPlan, dtype: torch.dtype, device: torch.device) -> None:
        shape = len(plan.rules), 2, FIRST_PAGES, PAGE, plan.heads, plan.key_width
        self.kv_L2CPGd = torch.zeros(shape, dtype=dtype, device=device)
        """Keys and values of all pages. Another tensor after the pool has grown."""
        self._free = list(range(FIRST_PAGES - 1, SCRATCH, -1))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, in all blocks."""
        return self.kv_L2CPGd.nbytes // self.kv_L2CPGd.shape[2]

    def take(self) -> int:
        """A free page. The pool grows if there is none."""
        if not self._free:
            pages = self.kv_L2CPGd.shape[2]
            self.kv_L2CPGd = torch.cat([self.kv_L2CPGd, torch.zeros_like(self.kv_L2CPGd)], dim=2)
            self._free = list(range(2 * pages - 1, pages - 1, -1))
        return self._free.pop()

    def give_back(self, pages: list[int]) -> None:
        """Free these pages."""
        self._free += pages


class PagedCache(SequenceCache):
    """The KV cache of one sequence, in pages. They are free again when the cache is garbage.

    Args:
        blocks: as of ``SequenceCache``. A page has room for all blocks.
    """

    def __init__(self, pool: PagePool, blocks: range | None = None) -> None:
        self.pool = pool
        self.blocks = range(pool.kv_L2CPGd.shape[0]) if blocks is None else blocks
        self.first = 0
        self.pages: list[int] = []
        """The sequence's pages, in order."""
        self.length = 0
        weakref.finalize(self, pool.give_back, self.pages)

    @property
    def nbytes(self) -> int:
        return len(self.pages) * self.pool.page_bytes

    def bytes_for(self, length: int) -> int:
        return max(len(self.pages), -(-length // PAGE)) * self.pool.page_bytes

    def reserve(self, length: int) -> None:
        while len(self.pages) * PAGE < length:
            self.pages.append(self.pool.take())

    def extend(self, block: int, key_1HNd: torch.Tensor, value_1HNd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + key_1HNd.shape[2]
        page, place = self._places(end)
        kv_2CPGd = self.pool.kv_L2CPGd[block]
        kv_2CPGd[:, page, place] = torch.cat([key_1HNd, value_1HNd]).transpose(1, 2)
        kv_2GSd = kv_2CPGd[:, self._numbers(0, end)].flatten(1, 2)[:, :end].transpose(1, 2)
        return kv_2GSd[:1], kv_2GSd[1:]

    def since(self, start: int) -> tuple[torch.Tensor, ...]:
        first = start // PAGE
        kv_L2SGd = self.pool.kv_L2CPGd[:, :, self._numbers(first, self.length)].flatten(2, 3)
        return kv_L2SGd[:, :, start - first * PAGE : self.length - first * PAGE].transpose(2, 3).unbind(0)

    def append(self, kv_L2HNd: torch.Tensor, block: int) -> None:
        page, place = self._places(self.length + kv_L2HNd.shape[-2])
        self.pool.kv_L2CPGd[block : block + len(kv_L2HNd), :, page, place] = kv_L2HNd.transpose(2, 3)

    def copy(self) -> PagedCache:
        twin = PagedCache(self.pool, self.blocks)
        twin.reserve(self.length)
        twin.length = self.length
        own, theirs = (one._numbers(0, self.length) for one in (self, twin))
        self.pool.kv_L2CPGd[:, :, theirs] = self.pool.kv_L2CPGd[:, :, own]
        return twin

    def _numbers(self, first: int, end: int) -> torch.Tensor:
        """Numbers of the pages from the ``first`` one up to that of the position before ``end``."""
        pages = self.pages[first : -(-end // PAGE)]
        return torch.tensor(pages, dtype=torch.long).to(self.pool.kv_L2CPGd.device)

    def _places(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Page, and place in it, of each position from ``length`` up to the one before ``end``."""
        positions = torch.arange(self.length, end)
        pages = torch.tensor(self.pages, dtype=torch.long)[positions // PAGE]
        return pages.to(self.pool.kv_L2CPGd.device), (positions % PAGE).to(self.pool.kv_L2CPGd.device)
