"""Blockwise quantization: int8 and int4 with one scale a block of a row, even channels, and outliers kept exact.

A transformer's residual stream has a few channels, and a first position, whose values are hundreds of times the others.
A scale that covers them leaves the others no levels, so one scale a row (or tensor) fails. Three remedies, none of
which needs calibration: values that stand out from their row cross exactly (LLM.int8(), Dettmers et al. 2022, keeps
whole columns); where a matrix has many rows, each channel is centred and scaled to one size; each block of a row then
has a scale of its own.

Shapes: T tokens (rows), D width, N blocks a row, B values a block, C = N · B channels, the last ones filled up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from isthmus.errors import FrameError

BLOCK = 32
STANDS_OUT = 3.0
"""An outlier is above this many times the median, over the blocks of its row, of their largest values."""
MOST_OUTLIERS = 1 / 2
"""Share of a matrix's values that may be outliers: by the median, at most half of the blocks can hold any."""
MANY_ROWS = 64
"""From so many rows on, channels are made even: it costs four bytes a channel."""
OCTAVE = 12
"""Scales are powers of two in steps of a twelfth of an octave below the matrix's largest; one byte holds 21 octaves."""
SMALLEST = 1e-30
CHUNK = 2**17
"""Values that the CPU works on at a time: small enough for the cache of a core."""
CPU = torch.device("cpu")
_REMEDY = "both sides must run the same version of isthmus with the same recipe"


Channels = tuple[torch.Tensor, torch.Tensor]
"""Mean and spread of each channel, in bf16, as they cross."""


@dataclass(frozen=True)
class Outliers:
    """Flat places and values of what stands out from its row, and from what on it does, ``limit_T``."""

    places: torch.Tensor
    values: torch.Tensor
    limit_T: torch.Tensor


@dataclass(frozen=True)
class Blockwise:
    """Encodes on whatever device the matrix is on; decodes on the device that it is wanted on.

    Bytes, one after another: number of outliers (uint32), largest scale (fp32), the outliers' places (uint32) and
    values (fp32); with many rows a mean and a spread a channel (bf16); the power of each block's scale (uint8); levels
    (``bits`` each, two's complement; of two 4-bit ones, the one of the block's earlier half is low)."""

    bits: int

    def encode(self, h_TD: torch.Tensor, generator: torch.Generator | None = None) -> bytes:
        """Quantize to the nearest level; with a generator at random to one of the two nearest, so that the mean over
        draws is the input."""
        h_TNB = _blocks(h_TD.detach().to(torch.float32))
        largest_TN, sums_2C = _measured(h_TNB)
        outliers = _outliers(h_TNB, largest_TN)
        channels = _channels(sums_2C, len(h_TNB), outliers)
        base = self._base(largest_TN, outliers, channels).to(h_TNB.device)
        powers, levels = [], []
        for part, places in zip(_chunks(h_TNB), _places_by_chunk(h_TNB, outliers), strict=True):
            part_TNB = _even(part, channels)
            part_TNB.view(-1)[places] = 0.0
            power, level = self._quantized(part_TNB, base, generator)
            powers.append(power)
            levels.append(level)
        head = (torch.tensor([len(outliers.places)], dtype=torch.int32), base, outliers.places.int(), outliers.values)
        return _bytes((*head, *(channels or ()), *powers, *levels), h_TNB.device)

    def decode(self, data: bytes, rows: int, width: int, device: torch.device = CPU) -> torch.Tensor:
        """The matrix, fp32, on this device.

        Raises:
            FrameError: too few or many bytes, an outlier outside the matrix, or NaN or infinity.
        """
        blocks, count = math.ceil(width / BLOCK), int.from_bytes(data[:4], "little")
        size = self._size(rows, blocks, count)
        if count > rows * blocks * BLOCK * MOST_OUTLIERS or len(data) != size:
            raise FrameError(f"{len(data)} bytes with {count} outliers where {size} are due", remedy=_REMEDY)
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        places = whole[8 : 8 + 4 * count].view(torch.int32)
        if count and (int(places.min()) < 0 or int(places.max()) >= rows * blocks * BLOCK):
            raise FrameError("an outlier outside the matrix", remedy=_REMEDY)
        h_TC = self._dequantized(whole.to(device), rows, blocks, count)
        if not is_finite(h_TC):
            raise FrameError("the matrix holds NaN or infinity", remedy="lower the sender's learning rate")
        return h_TC[:, :width].contiguous()

    def most_bytes(self, rows: int, width: int) -> int:
        """Of an encoded matrix of this shape."""
        blocks = math.ceil(width / BLOCK)
        return self._size(rows, blocks, int(rows * blocks * BLOCK * MOST_OUTLIERS))

    @property
    def _top(self) -> int:
        """The largest level."""
        return int(2 ** (self.bits - 1)) - 1

    def _base(self, largest_TN: torch.Tensor, outliers: Outliers, channels: Channels | None) -> torch.Tensor:
        """A scale that no block's is above, ``[1]``."""
        if channels is None:
            most = torch.minimum(largest_TN.amax(dim=1), outliers.limit_T).max()
        else:  # of T values of root mean square 1 none is above √T; a little more for the rounding of mean and spread
            most = torch.tensor(1.02 * math.sqrt(len(largest_TN)) + 1)
        return (most * (1.0001 / self._top)).clamp_min(SMALLEST).view(1)

    def _quantized(
        self, part_TNB: torch.Tensor, base: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The power of each block's scale, at which no level is out of range, and the packed levels; in place."""
        top = self._top + (0.49 if generator is None else 0.0)  # what is rounded to the nearest may reach a bit higher
        due_TN = part_TNB.abs().amax(dim=2) * (1.0001 / top)
        power_TN = (
            (255 + OCTAVE * torch.log2((due_TN / base).clamp_min(SMALLEST))).ceil_().clamp_(0, 255).nan_to_num_(255)
        )
        levels = part_TNB.mul_((1 / (_steps(base.device)[power_TN.int()] * base)).unsqueeze(2))
        if generator is None:
            levels.round_()
        else:
            draw = torch.rand(levels.shape, generator=generator, device=generator.device)
            levels.add_(draw.to(levels.device)).floor_()
        levels = levels.to(torch.int8)
        if self.bits == 4:
            low, high = levels.chunk(2, dim=2)
            levels = (low & 15) | (high << 4)
        return power_TN.to(torch.uint8), levels

    def _unpacked(self, levels: torch.Tensor) -> torch.Tensor:
        if self.bits == 8:
            return levels
        pairs = levels.view(-1, BLOCK // 2)
        return torch.cat([(pairs << 4) >> 4, pairs >> 4], dim=1)

    def _dequantized(self, whole: torch.Tensor, rows: int, blocks: int, count: int) -> torch.Tensor:
        """The matrix, the last block filled up, of all its bytes; on their device, which is asked nothing."""
        base, places, values, mean, spread, powers, levels = self._split(whole, rows, blocks, count)
        scale_TN1 = (_steps(whole.device)[powers.int()] * base).view(rows, blocks, 1)
        h_TC = (self._unpacked(levels).view(rows, blocks, BLOCK) * scale_TN1).flatten(1)
        if rows >= MANY_ROWS:
            h_TC.mul_(spread.float()).add_(mean.float())
        if count:
            h_TC.view(-1)[places.long()] = values
        return h_TC

    def _size(self, rows: int, blocks: int, count: int) -> int:
        channels = 4 * blocks * BLOCK if rows >= MANY_ROWS else 0
        return 8 + 8 * count + channels + rows * blocks * (1 + BLOCK * self.bits // 8)

    def _split(self, whole: torch.Tensor, rows: int, blocks: int, count: int) -> list[torch.Tensor]:
        channels = blocks * BLOCK if rows >= MANY_ROWS else 0
        fields = ((torch.float32, 1), (torch.int32, count), (torch.float32, count), (torch.bfloat16, channels))
        pieces, at = [], 4
        for dtype, number in (*fields, (torch.bfloat16, channels), (torch.uint8, rows * blocks)):
            end = at + number * dtype.itemsize
            pieces.append(whole[at:end].view(dtype))
            at = end
        return [*pieces, whole[at:].view(torch.int8)]


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; a device is asked once."""
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


@cache
def _steps(device: torch.device) -> torch.Tensor:
    """Each power's scale, relative to the matrix's largest."""
    with torch.inference_mode(False):
        return torch.exp2((torch.arange(256) - 255.0) / OCTAVE).to(device)


def _blocks(h_TD: torch.Tensor) -> torch.Tensor:
    """Rows cut into blocks, the last one filled up with zeros."""
    missing = -h_TD.shape[1] % BLOCK
    if missing:
        h_TD = torch.nn.functional.pad(h_TD, (0, missing))
    return h_TD.reshape(len(h_TD), -1, BLOCK)


def _chunks(h_TNB: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows, as many at a time as the device likes."""
    return h_TNB.split(_rows_at_once(h_TNB))  # type: ignore[no-untyped-call,no-any-return]


def _rows_at_once(h_TNB: torch.Tensor) -> int:
    """On the CPU as many as have ``CHUNK`` values, elsewhere all."""
    return max(1, CHUNK // h_TNB[0].numel()) if h_TNB.device.type == "cpu" else len(h_TNB)


def _measured(h_TNB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest value of each block, and for each channel sum and sum of squares."""
    parts = [(part.abs().amax(dim=2), part.flatten(1).sum(dim=0), part.flatten(1).square().sum(dim=0))
             for part in _chunks(h_TNB)]  # fmt: skip
    largest, sums, squares = zip(*parts, strict=True)
    return torch.cat(largest), torch.stack([torch.stack(sums).sum(dim=0), torch.stack(squares).sum(dim=0)])


def _outliers(h_TNB: torch.Tensor, largest_TN: torch.Tensor) -> Outliers:
    limit_T = STANDS_OUT * largest_TN.median(dim=1).values
    row, block = (largest_TN > limit_T.unsqueeze(1)).nonzero(as_tuple=True)
    found_FB = h_TNB[row, block]
    which, value = (found_FB.abs() > limit_T[row].unsqueeze(1)).nonzero(as_tuple=True)
    places = (row[which] * h_TNB.shape[1] + block[which]) * BLOCK + value
    return Outliers(places, found_FB[which, value], limit_T)


def _places_by_chunk(h_TNB: torch.Tensor, outliers: Outliers) -> list[torch.Tensor]:
    """The outliers' places, which go upwards by row, within each of ``_chunks``."""
    if _rows_at_once(h_TNB) >= len(h_TNB):
        return [outliers.places]
    size = _rows_at_once(h_TNB) * h_TNB[0].numel()
    chunk = outliers.places // size
    counts = torch.bincount(chunk, minlength=math.ceil(h_TNB.numel() / size)).tolist()
    return list((outliers.places - chunk * size).split(counts))  # type: ignore[no-untyped-call]


def _channels(sums_2C: torch.Tensor, rows: int, outliers: Outliers) -> Channels | None:
    """Mean and spread (root mean square deviation) of each channel without outliers; None for few rows.

    A channel that hardly varies gets a spread that covers the rounding of its mean.
    """
    if rows < MANY_ROWS:
        return None
    width, places = sums_2C.shape[1], outliers.places % sums_2C.shape[1]
    gone_2C = sums_2C.new_zeros(2, width).index_add_(
        1, places, torch.stack([outliers.values, outliers.values.square()])
    )
    mean_C, square_C = (sums_2C - gone_2C) / rows
    spread_C = (square_C - mean_C.square()).clamp_min(0).sqrt()
    spread_C = torch.maximum(spread_C, mean_C.abs() / 64).clamp_min(SMALLEST)
    return mean_C.to(torch.bfloat16), spread_C.to(torch.bfloat16)


def _even(part_TNB: torch.Tensor, channels: Channels | None) -> torch.Tensor:
    """A copy whose channels, if they are known, are centred and of one size."""
    if channels is None:
        return part_TNB.clone()
    mean_C, spread_C = channels
    return (part_TNB.flatten(1) - mean_C.float()).mul_(1 / spread_C.float()).view(part_TNB.shape)


def _bytes(pieces: tuple[torch.Tensor, ...], device: torch.device) -> bytes:
    """One after another; put together on the device, so that they come from it in one copy."""
    plain = [piece.to(device).contiguous().view(-1).view(torch.uint8) for piece in pieces if piece.numel()]
    return torch.cat(plain).cpu().numpy().tobytes()
