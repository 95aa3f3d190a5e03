"""Packing: real tokens out of a padded batch and back, for any padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.model.packing import Packing, Padding

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)
CPU = torch.device("cpu")


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    """Any mask ``[B, L]``, holes included, with a real token in it."""
    rows, length = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    bits = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length).filter(any))
    return torch.tensor(bits).view(rows, length)


@settings(derandomize=True, deadline=None)
@given(masks(), st.integers(1, 4), st.integers(0, 9))
def test_unpack_inverts_pack(real_BL: torch.Tensor, width: int, seed: int) -> None:
    packing = Packing(real_BL)
    h_BLD = torch.randn(*real_BL.shape, width, generator=torch.Generator().manual_seed(seed))
    h_TD = packing.pack(h_BLD)
    slow = [h_BLD[b, i] for b in range(real_BL.shape[0]) for i in range(real_BL.shape[1]) if real_BL[b, i]]
    assert torch.equal(h_TD, torch.stack(slow))
    assert torch.equal(packing.unpack(h_TD), h_BLD * real_BL.unsqueeze(-1))
    assert torch.equal(packing.pack(packing.unpack(h_TD)), h_TD)
    assert packing.lengths == [int(row.sum()) for row in real_BL]
    assert packing.full == bool(real_BL.all())


@settings(derandomize=True, deadline=None)
@given(LENGTHS, st.booleans())
def test_of_lengths_pads_on_the_side_asked_for(lengths: list[int], left: bool) -> None:
    packing = Packing.of_lengths(lengths, CPU, pad_left=left)
    longest = max(lengths)
    rows = [[0] * (longest - n) + [1] * n if left else [1] * n + [0] * (longest - n) for n in lengths]
    assert packing.real_BL.int().tolist() == rows
    assert packing.lengths == lengths


@settings(derandomize=True, deadline=None)
@given(LENGTHS)
def test_both_sides_pack_to_the_same_tokens(lengths: list[int]) -> None:
    h_TD = torch.arange(sum(lengths) * 2.0).view(-1, 2)
    for left in (False, True):
        packing = Packing.of_lengths(lengths, CPU, pad_left=left)
        assert torch.equal(packing.pack(packing.unpack(h_TD)), h_TD)


@pytest.mark.parametrize("lengths", [[3, 3], [3, 1]])
def test_gradients_pass_both_ways(lengths: list[int]) -> None:
    packing = Packing.of_lengths(lengths, CPU, pad_left=True)
    h_TD = torch.ones(sum(lengths), 2, requires_grad=True)
    packing.pack(packing.unpack(h_TD) * 3).sum().backward()
    assert torch.equal(h_TD.grad, torch.full_like(h_TD, 3))


@settings(derandomize=True, deadline=None)
@given(LENGTHS, st.integers(0, 9))
def test_padding_fills_a_row_up_with_its_own_last_token(lengths: list[int], seed: int) -> None:
    padding = Padding(lengths, CPU)
    h_TD = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(seed))
    h_BND = padding.pad(h_TD, dim=0)
    assert h_BND.shape == (len(lengths), max(lengths), 3)
    for row_ND, own_ND in zip(h_BND, torch.split(h_TD, lengths), strict=True):
        rest = max(lengths) - len(own_ND)
        assert torch.equal(row_ND, torch.cat([own_ND, own_ND[-1:].expand(rest, 3)]))
    assert torch.equal(padding.unpad(h_BND, dim=0), h_TD)
    assert torch.equal(padding.unpad(padding.pad(h_TD.T, dim=1), dim=1), h_TD.T)


def test_a_row_of_several_sequences_packs_to_each_of_them() -> None:
    starts = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 0, 0, 0]]).bool()
    packing = Packing(torch.ones(2, 5, dtype=torch.bool), starts)
    assert packing.lengths == [3, 1, 1, 1, 4]
    assert packing.full
    assert packing.rows(torch.arange(10).view(2, 5)) == [[0, 1, 2], [3], [4], [5], [6, 7, 8, 9]]
    assert torch.equal(packing.starts(), starts)


def test_a_padded_row_starts_at_its_first_token() -> None:
    packing = Packing(torch.tensor([[0, 1, 1], [1, 1, 0]]).bool())
    assert packing.starts().tolist() == [[False, True, False], [True, False, False]]
