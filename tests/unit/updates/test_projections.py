"""The Hadamard transform of a sketch against scipy's."""

from __future__ import annotations

import math

import torch
from scipy.linalg import hadamard

from isthmus.updates.projections import BLOCK, _hadamard, _mixed


def test_the_hadamard_matrix_is_scipys() -> None:
    expected = torch.from_numpy(hadamard(BLOCK, dtype=float)) / math.sqrt(BLOCK)
    assert torch.equal(_hadamard(), expected)


def test_the_transform_is_its_own_inverse() -> None:
    row_C = torch.randn(3 * BLOCK, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(_mixed(_mixed(row_C)), row_C)
