"""The codec: tensors come out as they went in, and nothing but the agreed matrix or tensors comes in."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import FrameError
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = st.integers(1, 40)
SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=4)
NOT_FINITE = [math.nan, math.inf, -math.inf]
EXPECTED = {"a": (2, 3), "b": (4,)}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrix(name: str = "fp32", rows: int = 3, width: int = 4) -> pb.Matrix:
    return codec.encode(drawn(rows, width), name)


def decoded(message: pb.Matrix, name: str = "fp32", rows: int = 3, width: int = 4) -> torch.Tensor:
    return codec.decode(message, rows=rows, width=width, codec=name)


def named(**shapes: tuple[int, ...]) -> list[pb.Tensor]:
    return codec.encode_named({name: drawn(*shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=100, deadline=None)
@given(rows=SIZES, width=SIZES, seed=st.integers(0, 2**31))
def test_matrix_comes_back_exactly(name: str, rows: int, width: int, seed: int) -> None:
    h_TD = drawn(rows, width, seed=seed, dtype=PLAIN[name])
    back = decoded(codec.encode(h_TD, name), name, rows, width)
    assert back.dtype is h_TD.dtype
    assert torch.equal(back, h_TD)


@pytest.mark.parametrize("name", PLAIN)
def test_every_finite_16_bit_pattern_comes_back(name: str) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.bfloat16 if name == "bf16" else torch.float16).to(PLAIN[name])
    h_TD = values[torch.isfinite(values)].view(-1, 2)
    back = decoded(codec.encode(h_TD, name), name, *h_TD.shape)
    raw = torch.int32 if name == "fp32" else torch.int16
    assert torch.equal(back.view(raw), h_TD.view(raw)), "zeros keep their sign too"


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=100, deadline=None)
@given(scale=st.floats(1e-6, 1e3), seed=st.integers(0, 2**31))
def test_rounding_is_torchs(name: str, scale: float, seed: int) -> None:
    h_TD = drawn(7, 5, seed=seed) * scale
    assert torch.equal(decoded(codec.encode(h_TD, name), name, 7, 5), h_TD.to(PLAIN[name]))


def test_bytes_are_little_endian_rows() -> None:
    message = codec.encode(torch.tensor([[1.0, 2.0], [-3.0, 0.5]]), "fp32")
    assert message.data == struct.pack("<4f", 1.0, 2.0, -3.0, 0.5)
    assert (message.codec, message.rows, message.width) == ("fp32", 2, 2)


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_input_need_not_be_contiguous(view: str) -> None:
    base = drawn(8, 8)
    h_TD = {"transposed": base.T, "strided": base[::2, 1::3], "expanded": base[:1].expand(5, 8)}[view]
    assert not h_TD.is_contiguous()
    assert torch.equal(decoded(codec.encode(h_TD, "fp32"), "fp32", *h_TD.shape), h_TD)


def test_input_may_require_a_gradient() -> None:
    assert torch.equal(decoded(codec.encode(drawn(3, 4).requires_grad_(), "fp32")), drawn(3, 4))


def test_result_is_writable_and_its_own() -> None:
    message = matrix()
    kept = bytes(message.data)
    one, other = decoded(message), decoded(message)
    one.zero_()
    assert message.data == kept
    assert torch.equal(other, drawn(3, 4))


@pytest.mark.parametrize(
    "changes",
    [
        {"codec": "bf16"},
        {"codec": ""},
        {"codec": "x" * 1000},
        {"rows": 4},
        {"rows": 0},
        {"rows": 2**32 - 1},
        {"width": 3},
        {"width": 0},
        {"rows": 4, "width": 3},
        {"data": b""},
        {"data": bytes(47)},
        {"data": bytes(49)},
        {"data": bytes(96)},
    ],
)
def test_another_matrix_than_agreed_is_refused(changes: dict[str, Any]) -> None:
    message = matrix()
    for field, value in changes.items():
        setattr(message, field, value)
    with pytest.raises(FrameError) as refused:
        decoded(message)
    assert refused.value.remedy
    assert len(refused.value.message) < 200


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_matrix_with_nan_or_infinity_is_refused(name: str, value: float) -> None:
    h_TD = drawn(3, 4)
    h_TD[2, 3] = value
    with pytest.raises(FrameError, match="NaN or infinity"):
        decoded(codec.encode(h_TD, name), name)


def test_what_overflows_the_codec_is_refused() -> None:
    with pytest.raises(FrameError, match="NaN or infinity"):
        decoded(codec.encode(torch.full((3, 4), 1e6), "fp16"), "fp16")


@pytest.mark.parametrize(("rows", "width"), [(0, 4), (3, 0), (0, 0)])
def test_an_empty_matrix_is_refused(rows: int, width: int) -> None:
    with pytest.raises(FrameError):
        decoded(codec.encode(torch.empty(rows, width), "fp32"), "fp32", rows, width)


@settings(max_examples=100, deadline=None)
@given(shapes=st.dictionaries(st.text(max_size=20), SHAPES, max_size=5))
def test_named_tensors_come_back_exactly(shapes: dict[str, list[int]]) -> None:
    tensors = {name: drawn(*shape, seed=len(name)) for name, shape in shapes.items()}
    sent = codec.encode_named(tensors)
    back = codec.decode_named(sent, {name: tuple(shape) for name, shape in shapes.items()})
    assert [tensor.name for tensor in sent] == sorted(shapes)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_named_tensors_are_sent_as_fp32() -> None:
    tensor = drawn(2, 3, dtype=torch.bfloat16)
    back = codec.decode_named(codec.encode_named({"a": tensor.T}), {"a": (3, 2)})
    assert torch.equal(back["a"], tensor.T.float())


def test_named_results_are_writable_and_their_own() -> None:
    sent = named(**EXPECTED)
    kept = bytes(sent[0].data)
    codec.decode_named(sent, EXPECTED)["a"].zero_()
    assert sent[0].data == kept


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ([], "a is missing"),
        (named(a=(2, 3)), "b is missing"),
        (named(a=(2, 3), b=(4,), c=(1,)), "unexpected tensor 'c'"),
        (named(a=(2, 3), b=(4,)) + named(b=(4,)), "unexpected tensor 'b'"),
        (named(a=(3, 2), b=(4,)), "a has shape"),
        (named(a=(6,), b=(4,)), "a has shape"),
        (named(a=(2, 3), b=(4, 1)), "b has shape"),
        ([*named(a=(2, 3)), pb.Tensor(name="b", shape=[4], data=bytes(15))], "15 bytes, expected 16"),
        ([*named(a=(2, 3)), pb.Tensor(name="b", shape=[4], data=bytes(32))], "32 bytes, expected 16"),
        ([*named(a=(2, 3)), pb.Tensor(name="b", shape=[4])], "0 bytes, expected 16"),
        ([pb.Tensor(name="", shape=[4], data=bytes(16))], "unexpected tensor ''"),
    ],
)
def test_other_tensors_than_agreed_are_refused(sent: list[pb.Tensor], told: str) -> None:
    with pytest.raises(FrameError, match=told) as refused:
        codec.decode_named(sent, EXPECTED)
    assert refused.value.remedy


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_named_tensor_with_nan_or_infinity_is_refused(value: float) -> None:
    tensor = drawn(4)
    tensor[1] = value
    with pytest.raises(FrameError, match="b holds NaN or infinity"):
        codec.decode_named([*named(a=(2, 3)), *codec.encode_named({"b": tensor})], EXPECTED)
