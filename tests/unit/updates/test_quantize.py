"""Fixed point: sums are exact in the ring and never overflow; rounding is unbiased."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import FrameError, RecipeError
from isthmus.privacy.noise import SeededNoise
from isthmus.updates.quantize import ROUNDING_PIECE, Integers, Ring, Whole

RINGS = st.builds(Ring, st.integers(1, 2000), st.floats(1e-3, 1e3), st.sampled_from([2, 4, 8, 12, 16, 20]))


def drawing(seed: int) -> SeededNoise:
    return SeededNoise(torch.Generator().manual_seed(seed))


def summed(ring: Ring, rows: Iterable[Whole]) -> Integers:
    """The sum of these rows, each by itself over the wire, added as words."""
    total, count = np.zeros(0, np.uint64), 0
    for row in rows:
        words, count = ring.read(ring.written(ring.pack(row)), len(row)), len(row)
        total = words + (total if len(total) else np.zeros_like(words))
    return ring.unpack(total, count)


@given(RINGS, st.sampled_from([-1.0, 1.0]), st.integers(1, 70))
def test_the_sum_of_all_silos_extremes_does_not_overflow(ring: Ring, side: float, count: int) -> None:
    one = ring.encode(np.full(count, side * 2 * ring.range, np.float32))
    words = ring.pack(one) * np.uint64(ring.silos)
    found = ring.decode(ring.unpack(words, count))
    most = ring.range * ring.silos
    assert (side * found > most * (1 - 1.01 / ring.levels)).all()
    assert (side * found < most * (1 + 1e-9)).all()
    assert ring.silos * ring.levels < 2 ** (ring.digit - 1)


@given(RINGS, st.integers(1, 20), st.integers(1, 70), st.randoms(use_true_random=False))
def test_sums_of_words_are_the_plain_integer_sums(ring: Ring, silos: int, count: int, draw: random.Random) -> None:
    """Beside Python's own whole numbers; extremes are drawn more often than chance would."""
    some = (-ring.levels, -1, 0, 1, ring.levels)
    rows = [
        [draw.choice((draw.randint(-ring.levels, ring.levels), draw.choice(some))) for _ in range(count)]
        for _ in range(min(silos, ring.silos))
    ]
    found = summed(ring, (np.array(row, np.int32) for row in rows))
    assert found.tolist() == [sum(numbers) for numbers in zip(*rows, strict=True)]
    assert np.array_equal(ring.unpack(ring.pack(found), count), found)


@given(RINGS, st.integers(1, 70), st.randoms(use_true_random=False))
def test_words_are_digits_and_cross_as_their_low_bytes(ring: Ring, count: int, draw: random.Random) -> None:
    """The words and bytes as Python's whole numbers make them."""
    row = [draw.randint(-ring.levels, ring.levels) for _ in range(count)]
    words = ring.words(count)
    plain = [
        sum(number << (ring.digit * place) for place, number in enumerate(row[word::words])) for word in range(words)
    ]
    data = b"".join((word % 2 ** (8 * ring.width)).to_bytes(ring.width, "little") for word in plain)
    packed = ring.pack(np.array(row, np.int32))
    assert packed.tolist() == [word % 2**64 for word in plain]
    assert ring.written(packed) == data
    assert ring.read(data, count).tolist() == [word % 2 ** (8 * ring.width) for word in plain]


@given(RINGS, st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_sums_are_those_of_the_rounded_numbers_within_a_step_a_silo(ring: Ring, count: int, seed: int) -> None:
    draw, count = np.random.default_rng(seed), min(count, ring.silos)
    values = draw.uniform(-ring.range, ring.range, (count, 50)).astype(np.float32)
    total = summed(ring, (ring.encode(row, drawing(seed)) for row in values))
    step = ring.range / ring.levels
    last_bits = ring.levels * 2.0**-22  # values are fp32
    assert np.abs(ring.decode(total) - values.sum(0, dtype=np.float64)).max() <= count * step * (1 + 1e-3 + last_bits)


@pytest.mark.parametrize("bits", [8, 16, 20])
@pytest.mark.parametrize("part", [0.3, -0.3, 0.01, -0.99])
def test_rounding_is_unbiased(bits: int, part: float) -> None:
    ring = Ring(1, 1.0, bits)
    value = np.full(200_000, part / ring.levels, np.float32)
    found = ring.encode(value, drawing(0))
    assert set(found.tolist()) == {math.floor(part), math.floor(part) + 1}
    up = part - math.floor(part)
    assert abs(found.mean() - part) < 4 * np.sqrt(up * (1 - up) / len(value))


def test_rounding_draws_anew_for_each_number_and_each_time() -> None:
    """Across the pieces in which it is done, too: no two stretches of one vector, or vectors, round alike."""
    ring, count = Ring(1, 1.0), 2**12
    values = np.full(ROUNDING_PIECE + count, 0.5 / ring.levels, np.float32)
    rows = [ring.encode(values) for _ in range(2)]
    stretches = [row[place : place + count] for row in rows for place in (0, count, ROUNDING_PIECE)]
    for one, other in itertools.combinations(stretches, 2):
        assert abs((one == other).mean() - 0.5) < 0.05


@given(RINGS, st.floats(0, 1))
def test_values_are_multiplied_before_they_are_clipped(ring: Ring, times: float) -> None:
    values = np.array([0.3 * ring.range, -3 * ring.range, 1.5 * ring.range], np.float32)
    room = np.zeros(4, np.int32)
    assert ring.encode(values, times=times, out=room[:3]) is not None
    assert room[3] == 0
    exact = np.clip(values.astype(np.float64) * times / ring.range, -1, 1) * ring.levels
    assert np.abs(room[:3] - exact).max() <= 1 + 2**-12 + ring.levels * 2.0**-22


@given(RINGS, st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_shares_add_up_however_few_bits_there_are(ring: Ring, shares: list[float]) -> None:
    shares = shares[: ring.silos]
    total = summed(ring, map(ring.encode_share, shares))
    assert ring.decode_share(total) == pytest.approx(sum(shares), abs=len(shares) * 2.0**-15)
    whole = sum(ring.encode_share(1.0).astype(object) for _ in range(ring.silos))
    assert ring.decode_share(np.array(whole, np.int64)) == ring.silos


def test_zero_stays_zero_and_what_is_too_large_is_clipped() -> None:
    ring = Ring(5, 0.5)
    assert not ring.encode(np.zeros(100, np.float32)).any()
    values = np.array([0.4, 0.6, -3.0, 0.5], np.float32)
    np.testing.assert_allclose(ring.decode(ring.encode(values)), [0.4, 0.5, -0.5, 0.5], atol=0.5 / ring.levels)


@pytest.mark.parametrize(
    ("silos", "bits", "numbers", "width"),
    [
        *((3, 16, 3, 7), (10, 16, 3, 8), (32, 16, 3, 8), (33, 16, 2, 6), (257, 16, 2, 7), (60_000, 16, 2, 8)),
        *((258, 8, 4, 8), (259, 8, 3, 7), (18, 4, 8, 8), (19, 4, 7, 8), (127, 2, 8, 8), (128, 2, 7, 8)),
    ],
)
def test_a_word_holds_as_many_numbers_as_the_bound_allows(silos: int, bits: int, numbers: int, width: int) -> None:
    ring = Ring(silos, 1.0, bits)
    assert (ring.numbers, ring.width) == (numbers, width)


@given(RINGS)
def test_numbers_take_no_more_than_whole_bytes_each_would(ring: Ring) -> None:
    assert ring.width <= ring.numbers * math.ceil(ring.digit / 8)


@given(st.integers(1, 500), st.sampled_from([2, 8, 16]), st.integers(0, 2**20))
def test_with_room_for_noise_no_sum_overflows(silos: int, bits: int, spare: int) -> None:
    ring = Ring(silos, 1.0, bits, spare)
    most = int(ring.most(silos))
    assert most == silos * ring.levels + spare
    for sides in itertools.product((-1, 1), repeat=3):
        total = np.array(sides, np.int64) * most
        assert np.array_equal(ring.unpack(ring.read(ring.written(ring.pack(total)), 3), 3), total)


def test_more_silos_than_the_ring_bears_are_refused() -> None:
    with pytest.raises(RecipeError, match="does not fit into 32 bits"):
        Ring(70_000, 1.0)


def test_bytes_of_another_length_are_refused() -> None:
    with pytest.raises(FrameError, match="32 expected"):
        Ring(5, 1.0).read(bytes(31), 10)
