"""Blockwise quantization: int8 and int4 with one scale a block, and outliers kept exact.

A transformer's residual stream has a few channels, and a first position, whose values are hundreds of times the others.
A scale that covers them leaves the others no levels, so one scale a row (or tensor) fails. Here a block that stands out
from its row gives up its large values, which cross exactly, before its scale is taken. (LLM.int8(), Dettmers et al.
2022, keeps whole outlying columns; single values need no calibration and follow the first position too.)

Shapes: T tokens (rows), D width, N blocks a row, B values a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from isthmus.errors import FrameError

BLOCK = 64
STANDS_OUT = 4.0
"""An outlier is above this many times the median, over the blocks of its row, of their largest values."""
MOST_OUTLIERS = 1 / 8
"""Share of a matrix's values that may be outliers. By the median, fewer than half of the blocks can hold any."""
HEADROOM = 1.004
"""Scales are rounded to bf16, by up to 2⁻⁹: this much more, and no level is out of range."""
SMALLEST, LARGEST = 1e-30, 3e38
CHUNK = 2**17
"""Values that are worked on at a time: small enough for the cache of a core."""
_REMEDY = "both sides must run the same version of isthmus with the same recipe"


@dataclass(frozen=True)
class Quantized:
    """Some rows: flat places and values of their outliers, a scale a block, packed levels."""

    places: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor
    levels: torch.Tensor


@dataclass(frozen=True)
class Blockwise:
    """Bytes, one after another: number of outliers (uint32), their places (uint32), their values (fp32), a scale a
    block (bf16), levels (``bits`` each, two's complement; of two 4-bit ones, the earlier half of the block is low)."""

    bits: int

    def encode(self, h_TD: torch.Tensor, generator: torch.Generator | None = None) -> bytes:
        """Quantize to the nearest level; with a generator at random to one of the two nearest, so that the mean over
        draws is the input."""
        blocks_TNB = _blocks(h_TD.detach().to(torch.float32))
        at_once = max(1, CHUNK // blocks_TNB[0].numel())
        parts = [self._quantized(part, generator) for part in torch.split(blocks_TNB, at_once)]
        for number, part in enumerate(parts):
            part.places.add_(number * at_once * blocks_TNB[0].numel())
        count = sum(len(part.places) for part in parts)
        pieces = [count.to_bytes(4, "little")]
        for field in ("places", "values", "scales", "levels"):
            pieces += [_bytes(getattr(part, field)) for part in parts]
        return b"".join(pieces)

    def decode(self, data: bytes, rows: int, width: int) -> torch.Tensor:
        """The matrix, fp32.

        Raises:
            FrameError: too few or many bytes, an outlier outside the matrix, or NaN or infinity.
        """
        blocks = math.ceil(width / BLOCK)
        count = int.from_bytes(data[:4], "little")
        size = self._size(rows, blocks, count)
        if count > rows * blocks * BLOCK * MOST_OUTLIERS or len(data) != size:
            raise FrameError(f"{len(data)} bytes with {count} outliers where {size} are due", remedy=_REMEDY)
        places, values, scales, levels = self._split(bytearray(data), rows * blocks, count)
        if not _all_below(scales, LARGEST / self._top) or not _all_below(values, LARGEST):
            raise FrameError("scales or outliers that are too large or no numbers", remedy=_REMEDY)
        h_TD = (self._unpacked(levels).view(rows, blocks, BLOCK) * scales.view(rows, blocks, 1).float()).flatten(1)
        if count:
            if int(places.min()) < 0 or int(places.max()) >= h_TD.numel():
                raise FrameError("an outlier outside the matrix", remedy=_REMEDY)
            h_TD.view(-1)[places.long()] = values
        return h_TD[:, :width].contiguous() if width % BLOCK else h_TD

    def most_bytes(self, rows: int, width: int) -> int:
        """Of an encoded matrix of this shape."""
        blocks = math.ceil(width / BLOCK)
        return self._size(rows, blocks, int(rows * blocks * BLOCK * MOST_OUTLIERS))

    def _quantized(self, blocks_TNB: torch.Tensor, generator: torch.Generator | None) -> Quantized:
        largest_TN = blocks_TNB.abs().amax(dim=2)
        places, values = _outliers(blocks_TNB, largest_TN)
        scales_TN = (largest_TN * (HEADROOM / self._top)).to(torch.bfloat16)
        scales_TN[largest_TN < SMALLEST] = 0
        inverse_TN = torch.where(scales_TN > 0, 1 / scales_TN.float(), 0.0)
        levels = blocks_TNB * inverse_TN.unsqueeze(2)
        levels.view(-1)[places] = 0.0
        if generator is None:
            levels.round_()
        else:
            draw = torch.rand(levels.shape, generator=generator, device=generator.device)
            levels.add_(draw.to(levels.device)).floor_()
            levels.view(-1)[places] = 0.0
        return Quantized(places.to(torch.int32), values, scales_TN, self._packed(levels.to(torch.int8)))

    @property
    def _top(self) -> int:
        """The largest level."""
        return int(2 ** (self.bits - 1)) - 1

    def _size(self, rows: int, blocks: int, count: int) -> int:
        return 4 + 8 * count + rows * blocks * (2 + BLOCK * self.bits // 8)

    def _split(self, data: bytearray, blocks: int, count: int) -> tuple[torch.Tensor, ...]:
        sizes = ((torch.int32, count), (torch.float32, count), (torch.bfloat16, blocks))
        pieces, at = [], 4
        for dtype, number in sizes:
            pieces.append(torch.frombuffer(data, dtype=dtype, count=number, offset=at) if number else torch.empty(0))
            at += number * dtype.itemsize
        return (*pieces, torch.frombuffer(data, dtype=torch.int8, offset=at))

    def _packed(self, levels_TNB: torch.Tensor) -> torch.Tensor:
        if self.bits == 8:
            return levels_TNB
        low, high = levels_TNB.chunk(2, dim=2)
        return (low & 15) | (high << 4)

    def _unpacked(self, levels: torch.Tensor) -> torch.Tensor:
        if self.bits == 8:
            return levels
        pairs = levels.view(-1, BLOCK // 2)
        return torch.cat([(pairs << 4) >> 4, pairs >> 4], dim=1)


def _blocks(h_TD: torch.Tensor) -> torch.Tensor:
    """Rows cut into blocks, the last one filled up with zeros."""
    rows, width = h_TD.shape
    missing = -width % BLOCK
    if missing:
        h_TD = torch.nn.functional.pad(h_TD, (0, missing))
    return h_TD.reshape(rows, -1, BLOCK)


def _outliers(blocks_TNB: torch.Tensor, largest_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat places and values of what stands out from its row; ``largest_TN`` becomes that of the others."""
    limit_T = STANDS_OUT * largest_TN.median(dim=1).values
    row, block = (largest_TN > limit_T.unsqueeze(1)).nonzero(as_tuple=True)
    found_FB = blocks_TNB[row, block]
    out_FB = found_FB.abs() > limit_T[row].unsqueeze(1)
    if len(row):
        largest_TN[row, block] = found_FB.masked_fill(out_FB, 0.0).abs().amax(dim=1)
    which, value = out_FB.nonzero(as_tuple=True)
    places = (row[which] * blocks_TNB.shape[1] + block[which]) * BLOCK + value
    return places, found_FB[which, value]


def _all_below(tensor: torch.Tensor, bound: float) -> bool:
    """Whether all are numbers of at most this size."""
    return not tensor.numel() or float(tensor.abs().max()) <= bound  # NaN is not


def _bytes(tensor: torch.Tensor) -> bytes:
    plain = tensor.to("cpu").contiguous().view(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
