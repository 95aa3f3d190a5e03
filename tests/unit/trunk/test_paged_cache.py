"""Paged caches: they hold what a cache of its own memory holds, and their pages return to the pool."""

from __future__ import annotations

import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import causal_mask_function

from isthmus.trunk.attention_plan import AttentionPlan, MaskRule
from isthmus.trunk.packed_attention import SequenceCache
from isthmus.trunk.paged_cache import FIRST_PAGES, PAGE, SCRATCH, PagedCache, PagePool

CPU = torch.device("cpu")
BLOCKS, HEADS, HEAD = 5, 2, 8
PLAN = AttentionPlan("sdpa", (MaskRule(causal_mask_function),) * BLOCKS, HEADS, HEAD, HEAD)
STEPS = st.one_of(
    st.tuples(st.just("extend"), st.integers(1, 2 * PAGE + 3)),
    st.tuples(st.just("append"), st.integers(1, PAGE)),
    st.tuples(st.just("crop"), st.integers(0, PAGE)),
    st.tuples(st.just("copy"), st.just(0)),
)


def pool() -> PagePool:
    return PagePool(PLAN, torch.float32, CPU)


def states(tokens: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(BLOCKS, 2, HEADS, tokens, HEAD, generator=draw)


def step(cache: SequenceCache, kind: str, size: int, seed: int) -> tuple[SequenceCache, list[torch.Tensor]]:
    """The cache after this step, and what the blocks see meanwhile."""
    if kind == "copy":
        return cache.copy(), []
    if kind == "crop":
        cache.crop(max(1, cache.length - size))
        return cache, []
    cache.reserve(cache.length + size)
    kv_L2HNd, seen = states(size, seed), []
    if kind == "append":
        cache.append(kv_L2HNd, 0)
    else:
        for block, (key_HNd, value_HNd) in enumerate(kv_L2HNd):
            seen += [one.clone() for one in cache.extend(block, key_HNd[None], value_HNd[None])]
    cache.length += size
    return cache, seen


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(STEPS, min_size=1, max_size=8), start=st.integers(0, PAGE + 5))
def test_a_paged_cache_holds_what_one_of_its_own_memory_holds(steps: list[tuple[str, int]], start: int) -> None:
    plain: SequenceCache = SequenceCache(PLAN, 2**20, torch.float32, CPU)
    paged: SequenceCache = PagedCache(pool())
    for seed, (kind, size) in enumerate([("extend", 7), *steps]):
        foretold = paged.bytes_for(paged.length + size) if kind in ("extend", "append") else paged.nbytes
        plain, expected = step(plain, kind, size, seed)
        paged, seen = step(paged, kind, size, seed)
        assert paged.nbytes <= foretold
        assert paged.length == plain.length
        assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))
        first = min(start, plain.length)
        pairs = zip(paged.since(first), plain.since(first), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_copy_shares_nothing() -> None:
    one, _ = step(PagedCache(pool()), "extend", PAGE + 1, 1)
    twin = one.copy()
    one.crop(1)
    step(one, "append", PAGE, 2)
    assert torch.equal(torch.stack(twin.since(0)), states(PAGE + 1, 1))


def test_pages_return_when_a_cache_is_garbage_and_the_pool_grows_when_none_is_left() -> None:
    pages = pool()
    caches = []
    for _ in range(FIRST_PAGES - 1):
        caches.append(PagedCache(pages))
        caches[-1].reserve(PAGE)
    taken = [cache.pages[0] for cache in caches]
    assert sorted(taken) == [page for page in range(FIRST_PAGES) if page != SCRATCH]
    caches[0].length = PAGE
    caches[0].append(states(0, 0), 0)
    before = pages.kv_L2CPGd
    caches.append(PagedCache(pages))
    caches[-1].reserve(1)
    assert pages.kv_L2CPGd is not before
    assert pages.kv_L2CPGd.shape[2] == 2 * FIRST_PAGES
    assert torch.equal(pages.kv_L2CPGd[:, :, :FIRST_PAGES], before)
    freed = caches.pop(3).pages[0]
    gc.collect()
    again = PagedCache(pages)
    again.reserve(1)
    assert again.pages == [freed]
