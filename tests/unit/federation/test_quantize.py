"""Fixed point: sums are exact in the ring and never overflow; rounding is unbiased."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import FrameError, RecipeError
from isthmus.federation.quantize import Ring

RINGS = st.builds(Ring, st.integers(1, 2000), st.floats(1e-3, 1e3), st.sampled_from([2, 4, 8, 12, 16, 20]))


@given(RINGS, st.sampled_from([-1.0, 1.0]))
def test_the_sum_of_all_silos_extremes_does_not_overflow(ring: Ring, side: float) -> None:
    one = ring.encode(np.full(3, side * 2 * ring.range, np.float32))
    total = np.zeros(3, np.uint32)
    for _ in range(ring.silos):
        total += one
    sent = ring.unpack(ring.pack(total), 3)
    most = ring.range * ring.silos
    assert (side * ring.decode(sent) > most * (1 - 1.01 / ring.levels)).all()
    assert (side * ring.decode(sent) < most * (1 + 1e-9)).all()
    assert ring.silos * ring.levels < 2 ** (8 * ring.width - 1)


@given(RINGS, st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_sums_are_those_of_the_rounded_numbers_within_a_step_a_silo(ring: Ring, count: int, seed: int) -> None:
    draw, count = np.random.default_rng(seed), min(count, ring.silos)
    values = draw.uniform(-ring.range, ring.range, (count, 50)).astype(np.float32)
    total = np.zeros(50, np.uint32)
    for row in values:
        total += ring.unpack(ring.pack(ring.encode(row, draw)), 50)
    step = ring.range / ring.levels
    last_bits = ring.levels * 2.0**-22  # rounding is in fp32
    assert np.abs(ring.decode(total) - values.sum(0, dtype=np.float64)).max() <= count * step * (1 + 1e-3 + last_bits)


def test_rounding_is_unbiased() -> None:
    ring, draw = Ring(1, 1.0, bits=8), np.random.default_rng(0)
    value = np.full(200_000, 0.3 / ring.levels, np.float32)
    found = ring.decode(ring.encode(value, draw)) * ring.levels
    assert abs(found.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / len(value))


@given(RINGS, st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_shares_add_up_however_few_bits_there_are(ring: Ring, shares: list[float]) -> None:
    shares = shares[: ring.silos]
    total = np.zeros(ring.digits, np.uint32)
    for share in shares:
        total += ring.unpack(ring.pack(ring.encode_share(share)), ring.digits)
    assert ring.decode_share(ring.whole(total)) == pytest.approx(sum(shares), abs=len(shares) * 2.0**-15)
    whole = sum(ring.encode_share(1.0).astype(object) for _ in range(ring.silos))
    assert ring.decode_share(np.array(whole, np.int64)) == ring.silos


def test_zero_stays_zero_and_what_is_too_large_is_clipped() -> None:
    ring = Ring(5, 0.5)
    assert not ring.encode(np.zeros(100, np.float32)).any()
    values = np.array([0.4, 0.6, -3.0, 0.5], np.float32)
    np.testing.assert_allclose(ring.decode(ring.encode(values)), [0.4, 0.5, -0.5, 0.5], atol=0.5 / ring.levels)


@pytest.mark.parametrize(("silos", "width"), [(1, 2), (2, 3), (256, 3), (257, 4), (60_000, 4)])
def test_elements_are_as_narrow_as_the_bound_allows(silos: int, width: int) -> None:
    assert Ring(silos, 1.0).width == width


@pytest.mark.parametrize(("silos", "bits", "width"), [(18, 4, 1), (19, 4, 2), (127, 2, 1), (128, 2, 2), (258, 8, 2)])
def test_few_bits_of_few_silos_fit_into_a_byte_or_two(silos: int, bits: int, width: int) -> None:
    assert Ring(silos, 1.0, bits).width == width


@given(st.integers(1, 500), st.sampled_from([2, 8, 16]), st.integers(0, 2**20))
def test_with_room_for_noise_no_sum_overflows(silos: int, bits: int, spare: int) -> None:
    ring = Ring(silos, 1.0, bits, spare)
    most = int(ring.most(silos))
    assert most == silos * ring.levels + spare
    for side in (-1, 1):
        total = np.array([side * most], np.int64).astype(np.uint32)
        assert ring.whole(ring.unpack(ring.pack(total), 1))[0] == side * most


def test_more_silos_than_the_ring_bears_are_refused() -> None:
    with pytest.raises(RecipeError, match="does not fit into 32 bits"):
        Ring(70_000, 1.0)


def test_bytes_of_another_length_are_refused() -> None:
    with pytest.raises(FrameError, match="where 30 are due"):
        Ring(5, 1.0).unpack(bytes(29), 10)
