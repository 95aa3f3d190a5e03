"""What a recipe's compression makes of an update, and what waits in the silo for the next one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import FrameError, RecipeError
from isthmus.updates.compression import Compression, ErrorFeedback
from isthmus.updates.projections import RandomK
from tests.conftest import make_recipe

SIZE = 600


def compression(**federation: Any) -> Compression:
    return Compression.of(make_recipe(Path("none"), silos=("a", "b", "c"), federation=federation))


def row(seed: int = 0) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def test_without_compression_updates_are_exact_and_nothing_waits() -> None:
    plain = compression()
    assert plain.exact
    assert plain.feedback() is None
    assert plain.compressor(SIZE, 1) is None
    assert plain.projection(SIZE, 1) is None


@pytest.mark.parametrize("kind", ["random-k", "sketch", "top-k"])
def test_fewer_numbers_cross_and_the_rest_is_left_out(kind: str) -> None:
    compressor = compression(compression={"kind": kind, "keep": 0.1}).compressor(SIZE, 1)
    assert compressor is not None
    data = compressor.encode(row())
    crossed = compressor.decode(data)
    assert len(data) < 4 * SIZE / 4
    assert crossed.shape == (SIZE,)
    assert 0 < (row() - crossed).norm() < row().norm()


def test_fewer_bits_cross_in_fewer_bytes() -> None:
    sizes = {}
    for bits in (4, 8, 16):
        compressor = compression(compression={"bits": bits}).compressor(SIZE, 1)
        assert compressor is not None
        sizes[bits] = len(compressor.encode(row()))
    assert sizes[4] < sizes[8] < sizes[16] < 4 * SIZE


def test_bytes_of_another_length_are_refused() -> None:
    compressor = compression(compression={"kind": "random-k", "keep": 0.1}).compressor(SIZE, 1)
    assert compressor is not None
    with pytest.raises(FrameError):
        compressor.decode(compressor.encode(row())[:-1])


def test_a_projection_under_masks_keeps_as_many_as_are_asked_for() -> None:
    projection = compression(secure=True, compression={"kind": "random-k", "keep": 0.25}).projection(SIZE, 1)
    assert isinstance(projection, RandomK)
    assert projection.size == SIZE // 4


def test_what_is_left_waits_for_the_same_tensors() -> None:
    feedback = ErrorFeedback()
    feedback.keep(("y", "x"), torch.ones(3))
    assert torch.equal(feedback.added(("x", "y"), torch.full((3,), 2.0)), torch.full((3,), 3.0))
    assert torch.equal(feedback.added(("x",), torch.zeros(3)), torch.zeros(3)), "these have nothing due"


def test_what_is_left_is_the_same_after_a_restart_and_of_no_other_model() -> None:
    feedback, again = ErrorFeedback(), ErrorFeedback()
    feedback.keep(("x",), row())
    again.load_state_dict(feedback.state_dict())
    assert torch.equal(again.added(("x",), torch.zeros(SIZE)), row())
    with pytest.raises(RecipeError, match="another model"):
        again.added(("x",), torch.zeros(SIZE + 1))
