"""The published formats' bytes, counted by hand: every element takes two bytes, padding included."""

from __future__ import annotations

from benchmarks.speed import boundary, published

HALF = 2
"""Bytes of an fp16 number."""


def test_a_training_step_crosses_four_times_with_its_padding() -> None:
    assert published.training_step_bytes([3, 5], padded=7, width=11) == 4 * (2 * 7 * 11) * HALF


def test_the_recorded_shape_takes_57_5_mebibytes() -> None:
    size = published.training_step_bytes(boundary.LENGTHS, boundary.PADDED, boundary.WIDTH)
    assert (len(boundary.LENGTHS), boundary.PADDED, boundary.WIDTH) == (2, 920, 4096)
    assert size == 57.5 * 2**20


def test_a_mask_has_a_number_for_each_pair_of_positions() -> None:
    assert published.mask_bytes(10) == 10 * 10 * HALF


def test_a_token_is_one_vector() -> None:
    assert published.token_bytes(4096) == 4096 * HALF


def test_ballast_is_about_as_large_as_it_says() -> None:
    assert 1000 <= published.ballast(1000).ByteSize() <= 1010
