"""What every codec promises: matrices come back as near as it says, nothing else comes in, and rounding has no bias."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import get_args

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus import recipe
from isthmus.errors import FrameError
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.blockwise import BLOCK_WIDTH

ERRORS = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11, "int8": 0.55 / 127, "int4": 0.55 / 7}
"""Largest error of a value, relative to the largest of its block; scales come in steps."""
PLAIN = {**codec.MATRIX_CODECS, **codec.RANGE_CODECS}
COARSE = ("int8", "int4", "int8+zstd", "int4+zstd", *codec.RANGE_CODECS)
SHAPES = st.tuples(st.integers(1, 20), st.integers(1, 200))


def drawn(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def back(h_TD: torch.Tensor, name: str, generator: torch.Generator | None = None) -> torch.Tensor:
    rows, width = h_TD.shape
    return codec.decode(codec.encode(h_TD, name, generator), rows=rows, width=width, codec=name).float()


def largest_of_block(h_TD: torch.Tensor) -> torch.Tensor:
    """For each value, the largest of its block."""
    padded = torch.nn.functional.pad(h_TD.abs(), (0, -h_TD.shape[1] % BLOCK_WIDTH)).view(h_TD.shape[0], -1, BLOCK_WIDTH)
    return padded.amax(dim=2, keepdim=True).expand_as(padded).flatten(1)[:, : h_TD.shape[1]]


def largest_error(h_TD: torch.Tensor, plain: str) -> torch.Tensor:
    """For each value, how far it may be off what comes back."""
    if plain in codec.RANGE_CODECS:  # half a step of the row's scale, which comes in steps too
        median_T1 = h_TD.abs().median(dim=1, keepdim=True).values
        scale_T1 = torch.where(median_T1 > 0, 1.4826 * median_T1, 1.2533 * h_TD.abs().mean(dim=1, keepdim=True))
        return (codec.RANGE_CODECS[plain].step * 0.52 * scale_T1).expand_as(h_TD)
    return ERRORS[plain] * largest_of_block(h_TD) + (2**-24 if plain == "fp16" else 0.0)


def level(h_TD: torch.Tensor, name: str) -> torch.Tensor:
    """Distance of two levels where a matrix is rounded at random."""
    if name in codec.RANGE_CODECS:
        return codec.RANGE_CODECS[name].step * h_TD.square().mean().sqrt()
    return largest_of_block(h_TD.clamp(-40, 40)) * 1.1 / (127 if name.startswith("int8") else 7)


def residual_stream(rows: int = 64, width: int = 576) -> torch.Tensor:
    """As a transformer's hidden states are: two channels and one value of the first position dwarf the rest."""
    h_TD = drawn(rows, width) * 3
    h_TD[:, 17] *= 40
    h_TD[:, 301] *= -60
    h_TD[0, 100] = 380
    return h_TD


def test_the_recipe_names_every_codec() -> None:
    assert set(get_args(recipe.Codec)) == set(codec.CODEC_NAMES)


@pytest.mark.parametrize("name", codec.CODEC_NAMES)
@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**31), scale=st.sampled_from([1e-8, 1e-3, 1.0, 3e3]))
def test_a_matrix_comes_back_as_near_as_the_codec_says(
    name: str, shape: tuple[int, int], seed: int, scale: float
) -> None:
    plain = name.removesuffix("+zstd")
    h_TD = drawn(*shape, seed=seed) * (1.0 if plain == "fp16" else scale)
    error = (back(h_TD, name) - h_TD).abs()
    assert (error <= largest_error(h_TD, plain)).all()


@pytest.mark.parametrize("name", codec.CODEC_NAMES)
@pytest.mark.parametrize("rows", [1, 5])
def test_zeros_and_strided_matrices(name: str, rows: int) -> None:
    assert torch.equal(back(torch.zeros(rows, 70), name), torch.zeros(rows, 70))
    wide = drawn(rows, 140)
    assert torch.equal(back(wide[:, ::2], name), back(wide[:, ::2].contiguous(), name))


@pytest.mark.parametrize("name", codec.CODEC_NAMES)
@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300), keep=st.integers(0, 400))
def test_other_bytes_are_refused_or_read_as_a_matrix(name: str, data: bytes, keep: int) -> None:
    good = codec.encode(drawn(2, 70), name).data
    for changed in (data, good[:keep] + data, good + data[:3]):
        with suppress(FrameError):
            h_TD = codec.decode(pb.Matrix(codec=name, rows=2, width=70, data=changed), rows=2, width=70, codec=name)
            assert h_TD.shape == (2, 70)
            assert torch.isfinite(h_TD).all()


@pytest.mark.parametrize("name", codec.CODEC_NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(name: str, value: float) -> None:
    h_TD = drawn(3, 130)
    h_TD[1, 80] = value
    with pytest.raises(FrameError):
        back(h_TD, name)


@pytest.mark.parametrize("name", codec.CODEC_NAMES)
def test_no_encoding_is_larger_than_announced(name: str) -> None:
    plain = PLAIN[name.removesuffix("+zstd")]
    for h_TD in (drawn(7, 200), residual_stream(), torch.zeros(3, 64), torch.randn(9, 640).pow(9)):
        assert len(plain.encode(h_TD)) <= plain.most_bytes(*h_TD.shape)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_outliers_cross_exactly_and_leave_the_others_their_levels(name: str) -> None:
    h_TD = residual_stream()
    found = back(h_TD, name)
    ordinary = h_TD.abs() < 12
    per_row = h_TD.abs().amax(dim=1, keepdim=True) / (127 if name == "int8" else 7)
    naive = (h_TD / per_row).round() * per_row
    assert torch.equal(found[h_TD.abs() > 100], h_TD[h_TD.abs() > 100])
    ours, theirs = ((one - h_TD)[ordinary].pow(2).mean().sqrt() for one in (found, naive))
    assert ours < 0.15 * theirs, "one scale a row spends its levels on the outliers"
    assert ours < (0.01 if name == "int8" else 0.13) * h_TD[ordinary].std()


@pytest.mark.parametrize("name", COARSE)
def test_random_rounding_has_no_bias(name: str) -> None:
    h_TD, draws = residual_stream(8), 2000
    generator = torch.Generator().manual_seed(0)
    mean = torch.stack([back(h_TD, name, generator) for _ in range(draws)]).double().mean(dim=0)
    assert ((mean - h_TD).abs() <= 5 * 0.5 * level(h_TD, name) / draws**0.5 + 1e-4).all()
    assert not torch.equal(back(h_TD, name, generator), back(h_TD, name, generator))
    assert torch.equal(back(h_TD, name), back(h_TD, name))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_an_outlier_outside_the_matrix_is_refused(name: str) -> None:
    data = bytearray(codec.encode(residual_stream(), name).data)
    for place in (-1, 64 * 576):
        struct.pack_into("<i", data, 8, place)
        with pytest.raises(FrameError, match="an outlier outside the matrix"):
            codec.decode(pb.Matrix(codec=name, rows=64, width=576, data=bytes(data)), rows=64, width=576, codec=name)


def test_a_compressed_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(2**28))
    assert len(bomb) < 10_000
    with pytest.raises(FrameError, match="compressed data of 268435456"):
        codec.decode(pb.Matrix(codec="int8+zstd", rows=2, width=64, data=bomb), rows=2, width=64, codec="int8+zstd")
