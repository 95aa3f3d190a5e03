"""Attention to pages: each row sees its own positions, within its window, wherever its pages are."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from isthmus.trunk.paged_attention import attend_to_gathered, attend_to_pages
from isthmus.trunk.paged_cache import PAGE

POSITIONS = [0, 5, PAGE - 1, PAGE, 3 * PAGE + 7]
PAGES = 4
SCALE = 0.3
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def case(heads: int, groups: int, width: int) -> Case:
    """Queries, pages, each row's table and positions; the pages of all rows are mixed."""
    draw = torch.Generator().manual_seed(heads)
    rows = len(POSITIONS)
    query_BHd = torch.randn(rows, heads, width, generator=draw)
    kv_2CPGd = torch.randn(2, rows * PAGES + 1, PAGE, groups, width, generator=draw)
    table_BM = (torch.randperm(rows * PAGES, generator=draw) + 1).view(rows, PAGES)
    return query_BHd, kv_2CPGd, table_BM, torch.tensor(POSITIONS)


def row_by_row(one: Case, window: int | None, scale: float | None) -> torch.Tensor:
    query_BHd, kv_2CPGd, table_BM, position_B = one
    found = []
    for query_Hd, table_M, position in zip(query_BHd, table_BM, position_B.tolist(), strict=True):
        first = 0 if window is None else max(0, position - window + 1)
        key_GSd, value_GSd = kv_2CPGd[:, table_M].flatten(1, 2)[:, first : position + 1].transpose(1, 2)
        repeated = (states.repeat_interleave(len(query_Hd) // len(states), dim=0) for states in (key_GSd, value_GSd))
        found.append(scaled_dot_product_attention(query_Hd.unsqueeze(1), *repeated, scale=scale).squeeze(1))
    return torch.stack(found)


@pytest.mark.parametrize("window", [None, 1, PAGE, PAGE + 3])
@pytest.mark.parametrize("scale", [None, SCALE])
def test_each_row_attends_to_its_own_positions(window: int | None, scale: float | None) -> None:
    one = case(heads=4, groups=2, width=8)
    torch.testing.assert_close(attend_to_pages(*one, window, scale), row_by_row(one, window, scale))


@needs_cuda
@pytest.mark.parametrize("window", [None, 1, PAGE, PAGE + 3])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 64), (8, 2, 128), (32, 1, 32), (5, 1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_computes_what_torch_does(
    window: int | None, heads: int, groups: int, width: int, dtype: torch.dtype
) -> None:
    one = case(heads, groups, width)
    query_BHd, kv_2CPGd = (states.to("cuda", dtype) for states in one[:2])
    rest = [numbers.to("cuda") for numbers in one[2:]]
    got = attend_to_pages(query_BHd, kv_2CPGd, *rest, window, SCALE)
    expected = attend_to_gathered(query_BHd.float(), kv_2CPGd.float(), *rest, window, SCALE)
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(got.float(), expected, rtol=bound, atol=bound)
