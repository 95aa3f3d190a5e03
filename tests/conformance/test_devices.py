"""Codecs and trunk on an accelerator: no step of theirs mixes devices, and where there is one, it computes the same.

Without an accelerator, torch's ``meta`` device stands for one: its tensors have shapes and no values, and mix with the
CPU's as little. They go through those steps of the codecs that do not depend on values, and through the trunk's passes.
"""

from __future__ import annotations

import pytest
import torch

from isthmus.errors import FrameError
from isthmus.privacy.mechanisms import Gaussian
from isthmus.privacy.noise import SecretNoise
from isthmus.privacy.subjects import Subjects
from isthmus.wire import blockwise, codec
from isthmus.wire.blockwise import BLOCK_WIDTH, Blockwise, Outliers

ELSEWHERE, CUDA = torch.device("meta"), torch.device("cuda")
ROWS, WIDTH = 80, 96
MANY = 1 + codec.SMALL_MATRIX // WIDTH
"""Rows enough to be coded on the device."""
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def matrix(rows: int = ROWS) -> torch.Tensor:
    """With outliers and, by default, rows enough for even channels."""
    h_TD = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0))
    h_TD[:, 7] *= 60
    return h_TD


@pytest.mark.parametrize("rows", [ROWS, 3])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("at_random", [False, True])
def test_quantizing_stays_on_the_device(rows: int, bits: int, at_random: bool) -> None:
    h_TNB = blockwise._blocks(torch.empty(rows, WIDTH - 5, device=ELSEWHERE))
    largest_TN, sums_2C = blockwise._measured(h_TNB)
    places, values = torch.empty(9, dtype=torch.long, device=ELSEWHERE), torch.empty(9, device=ELSEWHERE)
    outliers = Outliers(places, values, torch.empty(rows, device=ELSEWHERE))
    channels = blockwise._channels(sums_2C, rows, outliers)
    base = Blockwise(bits)._base(largest_TN, outliers, channels).to(ELSEWHERE)
    even_TNB = blockwise._normalized(h_TNB, channels)
    generator = torch.Generator() if at_random else None
    power_TN, levels = Blockwise(bits)._quantized(even_TNB, base, generator)
    assert {tensor.device.type for tensor in (even_TNB, power_TN, levels)} == {"meta"}


def test_noise_and_clipping_stay_on_the_device() -> None:
    secured = Gaussian(clip=1.0, noise=0.1).secure(
        torch.empty(3, WIDTH, device=ELSEWHERE), Subjects(("r",), (3,)), SecretNoise()
    )
    assert secured.device.type == "meta"


@pytest.mark.parametrize("rows", [ROWS, 3])
@pytest.mark.parametrize("bits", [8, 4])
def test_dequantizing_stays_on_the_device(rows: int, bits: int) -> None:
    data = Blockwise(bits).encode(matrix(rows))
    count = int.from_bytes(data[:4], "little")
    whole = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(ELSEWHERE)
    assert Blockwise(bits)._dequantized(whole, rows, WIDTH // BLOCK_WIDTH, count).device.type == "meta"


@needs_cuda
@pytest.mark.parametrize("name", codec.CODEC_NAMES)
@pytest.mark.parametrize("rows", [MANY, 3])
def test_what_is_decoded_on_the_device_is_what_the_processor_decodes(name: str, rows: int) -> None:
    sent = codec.encode(matrix(rows), name)
    here, there = (
        codec.decode(sent, rows=rows, width=WIDTH, codec=name, device=torch.device(device))
        for device in ("cpu", "cuda")
    )
    assert there.device.type == "cuda"
    assert float((there.cpu() - here).abs().max()) <= 1e-6 * float(here.abs().max())


@needs_cuda
@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_the_device_refuses_what_is_not_finite(name: str) -> None:
    sent = codec.encode(torch.ones(MANY, WIDTH), name)
    sent.data = sent.data[:4] + b"\xff" * (len(sent.data) - 4)
    with pytest.raises(FrameError):
        codec.decode(sent, rows=MANY, width=WIDTH, codec=name, device=CUDA)


@needs_cuda
@pytest.mark.parametrize("name", codec.CODEC_NAMES)
@pytest.mark.parametrize("rows", [MANY, ROWS, 3])
@pytest.mark.parametrize("generator", [None, "cpu", "cuda"])
def test_a_matrix_on_the_device_comes_back(name: str, rows: int, generator: str | None) -> None:
    h_TD, draw = matrix(rows), None if generator is None else torch.Generator(generator).manual_seed(1)
    there, here = codec.encode(h_TD.to(CUDA), name, draw), codec.encode(h_TD, name)
    found, expected = (codec.decode(one, rows=rows, width=WIDTH, codec=name).float() for one in (there, here))
    level = h_TD.abs().clamp_max(10).max() / (7 if name.startswith("int4") else 127)
    assert float((found - expected).abs().max()) <= (2.2 * level if name.startswith("int") else 0.0)


@needs_cuda
def test_named_tensors_on_the_device_come_back() -> None:
    h_TD = matrix()
    [sent] = codec.encode_named({"a": h_TD.to(CUDA)})
    assert torch.equal(codec.decode_named([sent], {"a": tuple(h_TD.shape)})["a"], h_TD)
