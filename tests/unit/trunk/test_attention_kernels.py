"""Kernels of packed attention: each sequence sees its own keys up to its own place, within its window."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from isthmus.trunk.attention_kernels import PackedLayout, Varlen, attend_padded
from tests.oracle.varlen import varlen

HEADS, GROUPS, HEAD = 4, 2, 8
CPU = torch.device("cpu")
NEW, SEEN = [2, 1, 5], [4, 1, 5]


def states(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sizes = ((HEADS, sum(NEW)), (GROUPS, sum(SEEN)), (GROUPS, sum(SEEN)))
    return tuple(torch.randn(1, heads, tokens, HEAD, generator=draw) for heads, tokens in sizes)  # type: ignore[return-value]


def plain(window: int | None) -> torch.Tensor:
    """Sequence by sequence."""
    query, key, value = states()
    pieces = zip(
        torch.split(query, NEW, dim=2), torch.split(key, SEEN, dim=2), torch.split(value, SEEN, dim=2), strict=True
    )
    outputs = []
    for q, k, v in pieces:
        own = torch.arange(k.shape[2])[None, :] - (k.shape[2] - q.shape[2] + torch.arange(q.shape[2]))[:, None]
        mask = (own <= 0) & (own > -(window or 10**6))
        k, v = (one.repeat_interleave(HEADS // GROUPS, dim=1) for one in (k, v))
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask))
    return torch.cat(outputs, dim=2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("kernel", [attend_padded, Varlen(varlen)], ids=["padded", "varlen"])
def test_a_kernel_equals_attention_sequence_by_sequence(kernel: object, window: int | None) -> None:
    layout = PackedLayout(NEW, SEEN, window, CPU)
    got = kernel(*states(), layout, None)  # type: ignore[operator]
    torch.testing.assert_close(got, plain(window), rtol=1e-5, atol=1e-5)


def test_bounds_are_cumulative_lengths() -> None:
    queries, keys = PackedLayout(NEW, SEEN, None, CPU).bounds
    assert (queries.tolist(), keys.tolist()) == ([0, 2, 3, 8], [0, 4, 5, 10])
    assert queries.dtype == torch.int32


def test_no_query_is_left_without_a_key() -> None:
    """Not even a padded one: the softmax of nothing is NaN."""
    assert PackedLayout(NEW, SEEN, 1, CPU).mask.any(dim=-1).all()


def test_more_new_tokens_than_keys_are_refused() -> None:
    with pytest.raises(RuntimeError):
        attend_padded(*states(), PackedLayout([2, 1, 6], SEEN, None, CPU), None)
