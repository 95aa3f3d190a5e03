"""Weights in groups of 4 bits: as close as claimed, and the packed order of this processor's kernel is read rightly.

Shapes: N rows of a weight, K its columns, G groups of a row, S columns of a group.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.model.int4_groups import dequantize, group_size, pack, quantize, round_groups, unpack

ROWS = st.integers(1, 12).map(lambda number: 16 * number)
COLUMNS = st.integers(1, 6).map(lambda number: 32 * number)
ROUND_TRIPS = """
import torch
from isthmus.model.int4_groups import pack, unpack
for rows in range(16, 208, 16):
    whole_NK = torch.randint(0, 16, (rows, 64), dtype=torch.uint8)
    assert torch.equal(unpack(pack(whole_NK)), whole_NK)
print(torch.backends.cpu.get_cpu_capability())
"""


def plainly_rounded(weight_NGS: torch.Tensor) -> torch.Tensor:
    """Between the least and the greatest weight of each group."""
    low_NG1, high_NG1 = (one[..., None] for one in weight_NGS.aminmax(dim=-1))
    step_NG1 = (high_NG1 - low_NG1) / 15
    return low_NG1 + step_NG1 * ((weight_NGS - low_NG1) / step_NG1).round()


@settings(deadline=None, max_examples=30)
@given(rows=ROWS, columns=COLUMNS, seed=st.integers(0, 9))
def test_what_is_packed_comes_back(rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    whole_NK = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    packed_NH = pack(whole_NK)
    assert packed_NH.nbytes == rows * columns // 2
    assert torch.equal(unpack(packed_NH), whole_NK)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_order_of_other_processors_is_read_too(capability: str) -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", ROUND_TRIPS], env=environment, check=True)


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 9), groups=st.integers(1, 3), seed=st.integers(0, 9), shift=st.sampled_from([0.0, 0.5, -9.0])
)
def test_no_group_is_further_off_than_without_refits(rows: int, groups: int, seed: int, shift: float) -> None:
    torch.manual_seed(seed)
    weight_NGS = torch.randn(rows, groups, 64) + shift
    plain, refitted = round_groups(weight_NGS, refits=0), round_groups(weight_NGS)
    assert (refitted.error_NG <= plain.error_NG).all()
    assert refitted.error_NG.sum() < plain.error_NG.sum()


def test_without_refits_it_is_plain_rounding() -> None:
    """Scale and zero have 8 significant bits, which moves a weight by a little more than half a step."""
    weight_NGS = torch.randn(32, 4, 64)
    groups = round_groups(weight_NGS, refits=0)
    plain_NG = (plainly_rounded(weight_NGS) - weight_NGS).square().sum(dim=-1)
    torch.testing.assert_close(groups.error_NG.sum(), plain_NG.sum(), rtol=0.02, atol=0)


def test_errors_are_those_of_the_dequantized_weights() -> None:
    weight_NK = torch.randn(48, 128)
    packed_NH, scale_zero_GN2 = quantize(weight_NK)
    assert (packed_NH.dtype, scale_zero_GN2.dtype) == (torch.uint8, torch.bfloat16)
    assert packed_NH.nbytes + scale_zero_GN2.nbytes == 4.5 / 8 * weight_NK.numel()
    squares = (dequantize(packed_NH, scale_zero_GN2) - weight_NK).square().sum()
    torch.testing.assert_close(squares, round_groups(weight_NK.view(48, 2, 64)).error_NG.sum())


@pytest.mark.parametrize("value", [0.0, 1.5, -2.0])
def test_equal_weights_stay_as_they_are(value: float) -> None:
    weight_NK = torch.full((16, 64), value)
    assert torch.equal(dequantize(*quantize(weight_NK)), weight_NK)


def test_weights_on_a_grid_stay_as_they_are() -> None:
    whole_NK = torch.arange(16.0).repeat(16, 4)
    assert torch.equal(dequantize(*quantize(0.25 * whole_NK - 1.0)), 0.25 * whole_NK - 1.0)


def test_a_row_is_divided_by_the_largest_size() -> None:
    assert [group_size(columns) for columns in (576, 64, 96, 32, 48, 172)] == [64, 64, 32, 32, 0, 0]
