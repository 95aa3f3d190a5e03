"""Blockwise codecs: the bytes they promise, errors of half a level, outliers exact, and no rubbish decoded."""

from __future__ import annotations

import pytest
import torch

from isthmus.errors import FrameError
from isthmus.wire.blockwise import BLOCK_WIDTH, Blockwise, is_finite


def rows(count: int = 5, width: int = 70, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def back(bits: int, h_TD: torch.Tensor) -> torch.Tensor:
    codec = Blockwise(bits)
    data = codec.encode(h_TD)
    return codec.decode(data, *h_TD.shape)


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
def test_values_come_back_to_half_a_level_of_their_block(bits: int, levels: int) -> None:
    h_TD = rows()
    found = back(bits, h_TD)
    pieces = zip(h_TD.split(BLOCK_WIDTH, dim=1), found.split(BLOCK_WIDTH, dim=1), strict=True)
    for piece, other in pieces:
        largest = piece.abs().amax(dim=1, keepdim=True)
        assert ((piece - other).abs() <= 1.07 * largest / levels * 0.51 + 1e-6).all()


def test_what_stands_out_comes_back_exactly() -> None:
    h_TD = rows()
    h_TD[2, 7] = 1234.5
    found = back(4, h_TD)
    assert found[2, 7] == 1234.5
    assert (found - h_TD)[2].abs().max() < 1.0, "its row is none the worse"


@pytest.mark.parametrize("shape", [(1, 1), (64, 33), (200, 32)], ids=str)
def test_any_shape_comes_back_in_shape(shape: tuple[int, int]) -> None:
    found = back(8, rows(*shape))
    assert found.shape == shape
    assert torch.allclose(found, rows(*shape), atol=0.05)


@pytest.mark.parametrize("cut", [0, 3, -1])
def test_bytes_of_another_length_are_refused(cut: int) -> None:
    codec = Blockwise(8)
    with pytest.raises(FrameError):
        codec.decode(codec.encode(rows())[:cut], *rows().shape)


def test_what_is_not_finite_is_found() -> None:
    assert is_finite(rows())
    for bad in (float("nan"), float("inf")):
        h_TD = rows()
        h_TD[0, 0] = bad
        assert not is_finite(h_TD)
