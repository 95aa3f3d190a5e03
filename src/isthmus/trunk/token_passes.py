"""Passes of one new token a sequence, recorded once as a CUDA graph and then replayed.

Launching the kernels of a pass from Python takes an accelerator's host several times as long as the kernels run. A
recorded pass is launched at once. It reads and writes the addresses that it was recorded with: the pages of a
``PagePool``, and buffers that are filled before each replay.

Shapes: B rows of the recorded pass, T sequences among them, M pages of a row, W width that crosses, D width, H heads, d
width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from isthmus.model.cut import Part
from isthmus.model.rope import by_length
from isthmus.trunk.attention_plan import AttentionPlan
from isthmus.trunk.paged_attention import attend_to_pages
from isthmus.trunk.paged_cache import PAGE, SCRATCH, PagedCache, PagePool

BlocksPass = Callable[[torch.Tensor, torch.Tensor, "TokenRows"], torch.Tensor]
"""Runs the blocks: hidden states ``[B, W]``, positions ``[1, B]`` and the rows to results ``[B, D]``."""


class TokenRows:
    """One new token a row, and the pages of each row's sequence: ``sequences`` of a pass, without its own lengths.

    Args:
        index_BK: each row's pages (``SCRATCH`` where it has none), then the new token's position: K = M + 1.
    """

    def __init__(self, pool: PagePool, plan: AttentionPlan, index_BK: torch.Tensor) -> None:
        self._kv_L2CPGd = pool.kv_L2CPGd
        self._plan = plan
        self._table_BM = index_BK[:, :-1]
        self.position_B = index_BK[:, -1]
        self._page_B = self._table_BM.gather(1, self.position_B.unsqueeze(1) // PAGE).squeeze(1)

    def attend_rows(self, module: Any, states: Sequence[torch.Tensor], settings: dict[str, Any]) -> torch.Tensor:
        """Add the new keys and values to the pages and attend to each row's own, ``[1, B, H, d]``.

        Args:
            states: queries, keys and values of the new tokens, ``[1, H, B, d]``.
        """
        query_BHd, key_BGd, value_BGd = (one_1HBd[0].transpose(0, 1) for one_1HBd in states)
        kv_2CPGd = self._kv_L2CPGd[module.layer_idx]
        kv_2CPGd[:, self._page_B, self.position_B % PAGE] = torch.stack([key_BGd, value_BGd])
        window, scale = self._plan.rules[module.layer_idx].window, settings.get("scaling")
        return attend_to_pages(query_BHd, kv_2CPGd, self._table_BM, self.position_B, window, scale).unsqueeze(0)


@dataclass(frozen=True)
class Recorded:
    """A pass of a fixed number of rows and pages."""

    h_BW: torch.Tensor
    index_BK: torch.Tensor
    result_BD: torch.Tensor
    replay: Callable[[], None]


class TokenPasses:
    """The recorded passes of a part. Rows and pages are rounded up to powers of two, so that there are few.

    Args:
        width: W.
        blocks: runs the part's blocks. On a CPU it is called at each pass: nothing is recorded there.
    """

    def __init__(self, blocks: BlocksPass, pool: PagePool, plan: AttentionPlan, width: int) -> None:
        self._blocks = blocks
        self._pool = pool
        self._plan = plan
        self._width = width
        self._recorded: dict[tuple[int, int], Recorded] = {}
        self._address = pool.kv_L2CPGd

    @torch.inference_mode()
    def __call__(self, h_TW: torch.Tensor, caches: list[PagedCache]) -> torch.Tensor:
        """The blocks' results for one new token of each sequence, ``[T, D]``. The caches have room, and are extended.

        Args:
            h_TW: hidden states of the new tokens.
        """
        recorded = self._find(_power(len(caches)), _power(max(len(cache.pages) for cache in caches)))
        rows, pages = recorded.index_BK.shape[0], recorded.index_BK.shape[1] - 1
        filled = [[*cache.pages, *[SCRATCH] * (pages - len(cache.pages)), cache.length] for cache in caches]
        empty = [[SCRATCH] * pages + [0]] * (rows - len(caches))
        recorded.index_BK.copy_(torch.tensor(filled + empty))
        recorded.h_BW[: len(caches)] = h_TW
        recorded.replay()
        for cache in caches:
            cache.length += 1
        return recorded.result_BD[: len(caches)].clone()

    def _find(self, rows: int, pages: int) -> Recorded:
        if self._address is not self._pool.kv_L2CPGd:  # the pool has grown: what was recorded reads the old pages
            self._recorded.clear()
            self._address = self._pool.kv_L2CPGd
        if (rows, pages) not in self._recorded:
            self._recorded[rows, pages] = self._record(rows, pages)
        return self._recorded[rows, pages]

    def _record(self, rows: int, pages: int) -> Recorded:
        like = self._pool.kv_L2CPGd
        h_BW = like.new_zeros(rows, self._width)
        index_BK = torch.full((rows, pages + 1), SCRATCH, device=like.device)

        def compute() -> torch.Tensor:
            sequences = TokenRows(self._pool, self._plan, index_BK)
            return self._blocks(h_BW, sequences.position_B.unsqueeze(0), sequences)

        result_BD = compute()  # loads kernels, which cannot be recorded
        if like.device.type != "cuda":

            def again() -> None:
                result_BD.copy_(compute())

            return Recorded(h_BW, index_BK, result_BD, again)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(like.device)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result_BD = compute()
        return Recorded(h_BW, index_BK, result_BD, graph.replay)


def recordable(part: Part, plan: AttentionPlan) -> bool:
    """Whether a pass of this part has the same kernels for any tokens, and attention that pages allow.

    Experts are chosen by token, and rotary frequencies that follow the length are chosen on the host.
    """
    chosen = any("expert" in name for name, _ in part.model.named_modules())
    paged = plan.attention == "sdpa" and plan.uniform
    return paged and not chosen and not by_length(part.config)


def _power(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()
