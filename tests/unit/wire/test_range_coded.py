"""Range-coded matrices: fewer bytes for the same error, hardly any for what hardly changed, and no rubbish decoded."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import FrameError
from isthmus.wire.blockwise import Blockwise
from isthmus.wire.range_coded import LARGEST_LEVEL, RangeCoded

HALF = RangeCoded(0.5)


def drawn(rows: int = 5, width: int = 70, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def gradient(rows: int = 400, width: int = 256) -> torch.Tensor:
    """Most of it in a tenth of the rows, as where a prompt's positions have little to do with the loss."""
    large_T1 = (torch.arange(rows) % 10 == 0).float().unsqueeze(1)
    return drawn(rows, width) * (3 * large_T1 + 0.17 * (1 - large_T1))


def error_of(found: torch.Tensor, h_TD: torch.Tensor) -> float:
    return float((found - h_TD).square().mean().sqrt() / h_TD.square().mean().sqrt())


@pytest.mark.parametrize("rows", [64, 200])
def test_hidden_states_take_fewer_bytes_than_blocks_of_four_bits_for_a_like_error(rows: int) -> None:
    spread_D = torch.logspace(-1, 1, 576)
    h_TD = drawn(rows, 576) * spread_D + 3 * spread_D * (torch.arange(576) % 7 == 0)
    ours, theirs = HALF.encode(h_TD), Blockwise(4).encode(h_TD)
    pairs = ((HALF, ours), (Blockwise(4), theirs))
    errors = [float(((one.decode(data, *h_TD.shape) - h_TD) / spread_D).std()) for one, data in pairs]
    assert len(ours) < 0.8 * len(theirs)
    assert errors[0] < 1.7 * errors[1]


def test_a_gradient_takes_the_bits_of_the_rows_that_matter() -> None:
    h_TD, draw = gradient(), torch.Generator().manual_seed(1)
    ours, theirs = HALF.encode(h_TD, draw), Blockwise(4).encode(h_TD, draw)
    errors = [error_of(one.decode(data, *h_TD.shape), h_TD) for one, data in ((HALF, ours), (Blockwise(4), theirs))]
    assert len(ours) < 0.5 * len(theirs)
    assert errors[0] < 1.6 * errors[1]


def test_bytes_are_near_the_entropy_of_the_levels() -> None:
    h_TD, draw = drawn(256, 512), torch.Generator().manual_seed(1)
    data = RangeCoded(1.0).encode(h_TD, draw)
    found = RangeCoded(1.0).decode(data, *h_TD.shape)
    share = torch.unique(found, return_counts=True)[1] / found.numel()
    entropy = float(-(share * share.log2()).sum())
    assert entropy - 0.01 < 8 * len(data) / found.numel() < entropy + 0.05


@pytest.mark.parametrize("rows", [3, 70])
def test_a_difference_comes_back_and_what_hardly_changed_costs_little(rows: int) -> None:
    before = drawn(rows, 300)
    before[0, 0] = 900.0
    for change, most in ((0.0, 0.02), (0.1, 0.4)):
        h_TD = before + change * drawn(rows, 300, seed=1)
        data = HALF.encode(h_TD, reference_TD=before)
        found = HALF.decode(data, rows, 300, reference_TD=before)
        assert len(data) < most * len(HALF.encode(h_TD)) + 60
        assert (found - h_TD).abs().max() < 0.5, "half a step of half a standard deviation, and channels differ"
        assert torch.equal(found, HALF.decode(data, rows, 300, reference_TD=before))
    assert torch.equal(HALF.decode(HALF.encode(before, reference_TD=before), rows, 300, reference_TD=before), before)


def test_a_difference_is_not_read_as_a_matrix_nor_a_matrix_as_a_difference() -> None:
    h_TD = drawn()
    with pytest.raises(FrameError, match="invalid range-coded data"):
        HALF.decode(HALF.encode(h_TD, reference_TD=h_TD), *h_TD.shape)
    with pytest.raises(FrameError, match="invalid range-coded data"):
        HALF.decode(HALF.encode(h_TD), *h_TD.shape, reference_TD=h_TD)


def test_outliers_cross_exactly() -> None:
    h_TD = drawn(70, 40)
    h_TD[3, 7], h_TD[9, 1] = 1234.5, -(LARGEST_LEVEL + 1) * 400.0
    found = HALF.decode(HALF.encode(h_TD), *h_TD.shape)
    assert (found[3, 7], found[9, 1]) == (1234.5, h_TD[9, 1])


@settings(max_examples=200, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4),
    keep=st.integers(0, 500),
    tail=st.binary(max_size=40),
    kind=st.sampled_from(["plain", "random", "difference"]),
)
def test_damaged_bytes_are_refused_or_read_as_a_finite_matrix(
    flips: list[tuple[int, int]], keep: int, tail: bytes, kind: str
) -> None:
    h_TD, reference = drawn(4, 90), drawn(4, 90, seed=2) if kind == "difference" else None
    draw = torch.Generator().manual_seed(0) if kind == "random" else None
    data = bytearray(HALF.encode(h_TD, draw, reference))
    for place, flip in flips:
        data[place % len(data)] ^= flip
    with suppress(FrameError):
        found = HALF.decode(bytes(data[:keep]) + tail, 4, 90, reference_TD=reference)
        assert found.shape == (4, 90)
        assert torch.isfinite(found).all()
