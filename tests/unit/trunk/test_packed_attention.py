"""A sequence's cache: room that grows and is foretold, positions that can be dropped, copies that share nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.trunk.packed_attention import FEW_NEW, INITIAL_ROOM, PackedSequences, SequenceCache, attend_by_groups
from tests.conftest import plan_of

CPU = torch.device("cpu")
BLOCKS, HEADS, HEAD = 5, 2, 8


def cache() -> SequenceCache:
    return SequenceCache(plan_of("sdpa", blocks=BLOCKS, heads=HEADS, widths=(HEAD, HEAD)), 512, torch.float32, CPU)


def states(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, HEADS, tokens, HEAD, generator=torch.Generator().manual_seed(seed))


def extended(one: SequenceCache, tokens: int, seed: int = 0) -> torch.Tensor:
    """With these keys (and values) in every block; what the last block then sees."""
    one.reserve(one.length + tokens)
    for block in range(BLOCKS):
        keys, values = one.extend(block, states(tokens, seed), states(tokens, seed))
        assert torch.equal(keys, values)
    one.length += tokens
    return keys


def test_keys_come_after_the_cached_ones() -> None:
    one = cache()
    extended(one, 3, seed=1)
    both = extended(one, 2, seed=2)
    assert torch.equal(both, torch.cat([states(3, 1), states(2, 2)], dim=2))
    assert [tuple(block.shape) for block in one.since(3)] == [(2, HEADS, 2, HEAD)] * BLOCKS


@pytest.mark.parametrize("tokens", [1, INITIAL_ROOM, INITIAL_ROOM + 1, 500, 512])
def test_memory_is_as_foretold(tokens: int) -> None:
    one = cache()
    assert one.nbytes == 0
    foretold = one.bytes_for(tokens)
    extended(one, tokens)
    assert one.nbytes == foretold >= BLOCKS * 2 * HEADS * HEAD * 4 * tokens


def test_what_is_cropped_is_written_over() -> None:
    one = cache()
    extended(one, 4, seed=1)
    one.crop(9)
    assert one.length == 4
    one.crop(1)
    assert torch.equal(extended(one, 2, seed=2), torch.cat([states(4, 1)[:, :, :1], states(2, 2)], dim=2))


def test_a_copy_shares_nothing() -> None:
    one = cache()
    extended(one, 2)
    twin = one.copy()
    extended(one, 1)
    assert (one.length, twin.length) == (3, 2)
    assert one.since(0)[0].data_ptr() != twin.since(0)[0].data_ptr()


def test_positions_go_on_where_each_cache_ends() -> None:
    one, other = cache(), cache()
    extended(one, 3)
    packed = PackedSequences(plan_of("sdpa"), [2, 3], [one, other])
    assert packed.positions(CPU).tolist() == [[3, 4, 0, 1, 2]]
    packed.finish()
    assert (one.length, other.length) == (5, 3)


def test_no_room_is_no_silent_loss() -> None:
    with pytest.raises(RuntimeError):
        cache().extend(0, states(2), states(2))


@given(
    new=st.integers(1, FEW_NEW),
    past=st.integers(0, 70),
    groups=st.integers(1, 4),
    shared=st.integers(1, 5),
    widths=st.tuples(st.sampled_from([4, 8, 24]), st.sampled_from([4, 8, 24])),
    window=st.integers(1, 80),
    additive=st.booleans(),
    scaling=st.none() | st.floats(0.05, 2.0),
)
def test_heads_that_share_keys_attend_as_each_would_alone(
    new: int,
    past: int,
    groups: int,
    shared: int,
    widths: tuple[int, int],
    window: int,
    additive: bool,
    scaling: float | None,
) -> None:
    """Beside softmax written out, head by head."""
    wide, narrow = widths
    query = torch.randn(1, groups * shared, new, wide)
    key, value = torch.randn(1, groups, past + new, wide), torch.randn(1, groups, past + new, narrow)
    behind = torch.arange(past, past + new)[:, None] - torch.arange(past + new)
    seen = (behind >= 0) & (behind < window)
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if additive else seen
    found = attend_by_groups(query, key, value, mask[None, None], scaling)
    assert found.shape == (1, new, groups * shared, narrow)
    for head in range(groups * shared):
        scores = query[0, head] @ key[0, head // shared].T * (wide**-0.5 if scaling is None else scaling)
        expected = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ value[0, head // shared]
        torch.testing.assert_close(found[0, :, head], expected, rtol=1e-4, atol=1e-5)
