"""Attention of one new token a row to its pages: by torch on any device, and by a Triton kernel that gathers nothing.

The kernel shares a row's pages out among programs and joins their parts by their weights, as flash decoding does (Dao
et al. 2023).

Shapes: B rows, M pages of a row, S = M · ``PAGE`` positions, C pages, P positions in a page, H heads, G heads of keys
and values, R = H / G, d width of a head, N parts that a row's pages are shared out in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs has none
    triton = None

LEAST_ROWS = 16
"""Least rows of a product in Triton."""
WIDEST = 256
"""Largest width of a head that the kernel takes."""
PARTS = 8
"""N."""
ENDLESS = 2**30
"""The window of attention without one."""


def attend_to_pages(
    query_BHd: torch.Tensor,
    kv_2CPGd: torch.Tensor,
    table_BM: torch.Tensor,
    position_B: torch.Tensor,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """The attention of each row's new token to the keys and values of its pages, ``[B, H, d]``.

    Args:
        table_BM: the numbers of each row's pages, in order.
        position_B: position of each row's new token, whose own keys and values are in the pages.
        window: number of positions that it attends to at most, its own included; None: all.
        scale: factor of the scores; None: 1 / √d.
    """
    width = query_BHd.shape[2]
    scale = width**-0.5 if scale is None else scale
    fits = width <= WIDEST and width >= LEAST_ROWS and width & (width - 1) == 0
    if _KERNEL is not None and query_BHd.device.type == "cuda" and fits:
        return _attend_by_kernel(query_BHd, kv_2CPGd, table_BM, position_B, window or ENDLESS, scale)
    return attend_to_gathered(query_BHd, kv_2CPGd, table_BM, position_B, window, scale)


def attend_to_gathered(
    query_BHd: torch.Tensor,
    kv_2CPGd: torch.Tensor,
    table_BM: torch.Tensor,
    position_B: torch.Tensor,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """``attend_to_pages`` by torch's attention on a copy of the rows' pages."""
    key_BGSd, value_BGSd = kv_2CPGd[:, table_BM].flatten(2, 3).transpose(2, 3)
    _, groups, places, _ = key_BGSd.shape
    key_S = torch.arange(places, device=table_BM.device)
    own_B1 = position_B.unsqueeze(1)
    mask_BS = (key_S <= own_B1) & (key_S > own_B1 - (window or ENDLESS))
    query_BGRd = query_BHd.view(len(query_BHd), groups, -1, query_BHd.shape[2])
    output_BGRd = scaled_dot_product_attention(
        query_BGRd, key_BGSd, value_BGSd, attn_mask=mask_BS[:, None, None], scale=scale
    )
    return output_BGRd.flatten(1, 2)


def _attend_by_kernel(
    query_BHd: torch.Tensor,
    kv_2CPGd: torch.Tensor,
    table_BM: torch.Tensor,
    position_B: torch.Tensor,
    window: int,
    scale: float,
) -> torch.Tensor:
    rows, heads, width = query_BHd.shape
    _, _, page, groups, _ = kv_2CPGd.shape
    pages = table_BM.shape[1]
    parts = min(PARTS, pages)
    group = heads // groups
    part_BNHd = query_BHd.new_empty(rows, parts, heads, width, dtype=torch.float32)
    weight_BNH = query_BHd.new_empty(rows, parts, heads, dtype=torch.float32)
    _KERNEL[(rows, groups, parts)](
        query_BHd.contiguous(),
        kv_2CPGd[0],
        kv_2CPGd[1],
        table_BM,
        table_BM.stride(0),
        position_B,
        position_B.stride(0),
        part_BNHd,
        weight_BNH,
        window,
        scale,
        PARTS=parts,
        SHARE=-(-pages // parts),
        PAGE=page,
        GROUPS=groups,
        GROUP=group,
        ROWS=max(LEAST_ROWS, 1 << (group - 1).bit_length()),
        WIDTH=width,
    )
    share_BNH1 = weight_BNH.softmax(dim=1).unsqueeze(3)
    return (share_BNH1 * part_BNHd).sum(dim=1).to(query_BHd.dtype)


def _attend_part(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    table,
    table_stride,
    position,
    position_stride,
    part,
    weight,
    window,
    scale,
    PARTS: tl.constexpr,
    SHARE: tl.constexpr,
    PAGE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row, one head of keys and one part of the pages: the softmax's mean of the values, and the log of its sum."""
    row, head, number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    own = tl.load(position + row * position_stride)
    r, d, p = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, PAGE)
    first = (row * GROUPS + head) * GROUP
    q = tl.load(query + (first + r[:, None]) * WIDTH + d[None, :], mask=r[:, None] < GROUP, other=0.0)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, WIDTH], tl.float32)
    start = tl.maximum(number * SHARE, (own - window + 1) // PAGE)
    end = tl.minimum((number + 1) * SHARE, own // PAGE + 1)
    for place in range(start, end):
        page = tl.load(table + row * table_stride + place).to(tl.int64)
        at = page * (PAGE * GROUPS * WIDTH) + (p[:, None] * GROUPS + head) * WIDTH + d[None, :]
        k = tl.load(keys + at)
        v = tl.load(values + at)
        seen = place * PAGE + p
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(((seen <= own) & (seen > own - window))[None, :], scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        kept = tl.exp(highest - new)
        share = tl.exp(scores - new[:, None])
        total = total * kept + tl.sum(share, 1)
        mean = mean * kept[:, None] + tl.dot(share.to(v.dtype), v, input_precision="ieee")
        highest = new
    out = ((row * PARTS + number) * GROUPS + head) * GROUP + r
    some = total > 0
    mean = mean / tl.where(some, total, 1.0)[:, None]
    log = tl.where(some, highest + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(part + out[:, None] * WIDTH + d[None, :], mean, mask=r[:, None] < GROUP)
    tl.store(weight + out, log, mask=r < GROUP)


_KERNEL: Any = None if triton is None else triton.jit(_attend_part)
