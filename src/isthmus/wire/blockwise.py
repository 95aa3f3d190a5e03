"""Blockwise quantization: int8 and int4 with one scale for each block of a row, normalized channels and exact outliers.

A transformer's residual stream has a few channels, and a first position, whose values are hundreds of times the others.
A scale that covers them leaves no levels for the others, so one scale for each row or tensor fails. Three remedies,
none of which needs calibration: outliers of a row cross exactly (LLM.int8(), Dettmers et al. 2022, keeps whole
columns); where a matrix has many rows, each channel is centred and divided by its spread; and each block of a row has
its own scale.

Shapes: T tokens (rows), D width, N blocks in a row, B values in a block, C = N · B channels (D padded with zeros).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from isthmus.errors import FrameError

BLOCK_WIDTH = 32
"""B."""
OUTLIER_RATIO = 3.0
"""An outlier's magnitude exceeds this multiple of the median, over the blocks of its row, of the blocks' largest
ones."""
LARGEST_OUTLIER_SHARE = 1 / 2
"""Largest share of outliers in a matrix: by the median, at most half of the blocks of a row hold any."""
NORMALIZED_ROWS = 64
"""Smallest number of rows with which channels are normalized, which costs four bytes for each channel."""
STEPS_PER_OCTAVE = 12
"""Number of scales for each factor of two below the matrix's largest scale. One byte covers 21 octaves."""
SMALLEST_SCALE = 1e-30
CHUNK_VALUES = 2**17
"""Number of values that the CPU processes at a time, so that they stay in a core's cache."""
_CPU = torch.device("cpu")
_REMEDY = "both sides must run the same version of isthmus with the same recipe"


Channels = tuple[torch.Tensor, torch.Tensor]
"""Mean and spread of each channel, bf16 ``[C]`` each, as they cross."""


@dataclass(frozen=True)
class Outliers:
    """The outliers of a matrix."""

    places: torch.Tensor
    """Flat indices into ``[T, C]``, in increasing order of rows."""
    values: torch.Tensor
    """Their values."""
    limit_T: torch.Tensor
    """The magnitude above which a value of each row is an outlier."""


@dataclass(frozen=True)
class Blockwise:
    """The blockwise matrix codec. Encodes on the matrix's device; decodes on the requested device.

    Format: number of outliers (uint32); largest scale (fp32); places (uint32) and values (fp32) of the outliers; with
    ``NORMALIZED_ROWS`` or more rows, means and spreads of the channels (bf16); the power of each block's scale (uint8);
    levels (``bits`` each, two's complement; a byte holds two 4-bit levels, the low one from the block's first half).
    """

    bits: int
    """8 or 4."""

    def encode(self, h_TD: torch.Tensor, generator: torch.Generator | None = None) -> bytes:
        """The bytes of ``h_TD [T, D]``. Rounds to the nearest level; with a generator at random to one of the two
        nearest, without bias."""
        h_TNB = _blocks(h_TD.detach().to(torch.float32))
        largest_TN, sums_2C = _measured(h_TNB)
        outliers = _outliers(h_TNB, largest_TN)
        channels = _channels(sums_2C, len(h_TNB), outliers)
        base = self._base(largest_TN, outliers, channels).to(h_TNB.device)
        powers, levels = [], []
        for part, places in zip(_chunks(h_TNB), _places_by_chunk(h_TNB, outliers), strict=True):
            part_TNB = _normalized(part, channels)
            part_TNB.view(-1)[places] = 0.0
            power, level = self._quantized(part_TNB, base, generator)
            powers.append(power)
            levels.append(level)
        head = (torch.tensor([len(outliers.places)], dtype=torch.int32), base, outliers.places.int(), outliers.values)
        return _bytes((*head, *(channels or ()), *powers, *levels), h_TNB.device)

    def decode(self, data: bytes, rows: int, width: int, device: torch.device = _CPU) -> torch.Tensor:
        """The matrix, fp32 ``[rows, width]`` on this device.

        Raises:
            FrameError: a wrong number of bytes, an outlier outside the matrix, or NaN or infinity.
        """
        blocks, count = math.ceil(width / BLOCK_WIDTH), int.from_bytes(data[:4], "little")
        size = self._size(rows, blocks, count)
        if count > rows * blocks * BLOCK_WIDTH * LARGEST_OUTLIER_SHARE or len(data) != size:
            raise FrameError(f"received {len(data)} bytes with {count} outliers, expected {size} bytes", remedy=_REMEDY)
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        places = whole[8 : 8 + 4 * count].view(torch.int32)
        if count and (int(places.min()) < 0 or int(places.max()) >= rows * blocks * BLOCK_WIDTH):
            raise FrameError("an outlier outside the matrix", remedy=_REMEDY)
        h_TC = self._dequantized(whole.to(device), rows, blocks, count)
        if not is_finite(h_TC):
            raise FrameError("the matrix holds NaN or infinity", remedy="lower the sender's learning rate")
        return h_TC[:, :width].contiguous()

    def most_bytes(self, rows: int, width: int) -> int:
        """The largest number of bytes of an encoded matrix of this shape."""
        blocks = math.ceil(width / BLOCK_WIDTH)
        return self._size(rows, blocks, int(rows * blocks * BLOCK_WIDTH * LARGEST_OUTLIER_SHARE))

    @property
    def _top(self) -> int:
        """The largest level."""
        return int(2 ** (self.bits - 1)) - 1

    def _base(self, largest_TN: torch.Tensor, outliers: Outliers, channels: Channels | None) -> torch.Tensor:
        """An upper bound of all blocks' scales, ``[1]``."""
        if channels is None:
            most = torch.minimum(largest_TN.amax(dim=1), outliers.limit_T).max()
        else:  # T values of root mean square 1 are at most √T; the margin covers the rounding of mean and spread
            most = torch.tensor(1.02 * math.sqrt(len(largest_TN)) + 1)
        return (most * (1.0001 / self._top)).clamp_min(SMALLEST_SCALE).view(1)

    def _quantized(
        self, part_TNB: torch.Tensor, base: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The power of each block's scale, with which all levels are in range, and the packed levels. Works in
        place."""
        top = self._top + (0.49 if generator is None else 0.0)  # rounding to the nearest level allows a bit more
        due_TN = part_TNB.abs().amax(dim=2) * (1.0001 / top)
        power_TN = (
            (255 + STEPS_PER_OCTAVE * torch.log2((due_TN / base).clamp_min(SMALLEST_SCALE)))
            .ceil_()
            .clamp_(0, 255)
            .nan_to_num_(255)
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
        pairs = levels.view(-1, BLOCK_WIDTH // 2)
        return torch.cat([(pairs << 4) >> 4, pairs >> 4], dim=1)

    def _dequantized(self, whole: torch.Tensor, rows: int, blocks: int, count: int) -> torch.Tensor:
        """The matrix ``[T, C]`` of these bytes, on their device and without synchronizing with it."""
        base, places, values, mean, spread, powers, levels = self._split(whole, rows, blocks, count)
        scale_TN1 = (_steps(whole.device)[powers.int()] * base).view(rows, blocks, 1)
        h_TC = (self._unpacked(levels).view(rows, blocks, BLOCK_WIDTH) * scale_TN1).flatten(1)
        if rows >= NORMALIZED_ROWS:
            h_TC.mul_(spread.float()).add_(mean.float())
        if count:
            h_TC.view(-1)[places.long()] = values
        return h_TC

    def _size(self, rows: int, blocks: int, count: int) -> int:
        channels = 4 * blocks * BLOCK_WIDTH if rows >= NORMALIZED_ROWS else 0
        return 8 + 8 * count + channels + rows * blocks * (1 + BLOCK_WIDTH * self.bits // 8)

    def _split(self, whole: torch.Tensor, rows: int, blocks: int, count: int) -> list[torch.Tensor]:
        channels = blocks * BLOCK_WIDTH if rows >= NORMALIZED_ROWS else 0
        fields = ((torch.float32, 1), (torch.int32, count), (torch.float32, count), (torch.bfloat16, channels))
        pieces, at = [], 4
        for dtype, number in (*fields, (torch.bfloat16, channels), (torch.uint8, rows * blocks)):
            end = at + number * dtype.itemsize
            pieces.append(whole[at:end].view(dtype))
            at = end
        return [*pieces, whole[at:].view(torch.int8)]


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; synchronizes with the device once."""
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


@cache
def _steps(device: torch.device) -> torch.Tensor:
    """The scale of each power relative to the largest scale, ``[256]``."""
    with torch.inference_mode(False):
        return torch.exp2((torch.arange(256) - 255.0) / STEPS_PER_OCTAVE).to(device)


def _blocks(h_TD: torch.Tensor) -> torch.Tensor:
    """The matrix as ``[T, N, B]``, the last block padded with zeros."""
    missing = -h_TD.shape[1] % BLOCK_WIDTH
    if missing:
        h_TD = torch.nn.functional.pad(h_TD, (0, missing))
    return h_TD.reshape(len(h_TD), -1, BLOCK_WIDTH)


def _chunks(h_TNB: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The matrix split into chunks of rows (see ``_rows_at_once``)."""
    return h_TNB.split(_rows_at_once(h_TNB))  # type: ignore[no-untyped-call,no-any-return]


def _rows_at_once(h_TNB: torch.Tensor) -> int:
    """Number of rows of a chunk: on the CPU as many as have ``CHUNK_VALUES`` values, elsewhere all."""
    return max(1, CHUNK_VALUES // h_TNB[0].numel()) if h_TNB.device.type == "cpu" else len(h_TNB)


def _measured(h_TNB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest magnitude of each block, ``[T, N]``, and each channel's sum and sum of squares, ``[2, C]``."""
    parts = [(part.abs().amax(dim=2), part.flatten(1).sum(dim=0), part.flatten(1).square().sum(dim=0))
             for part in _chunks(h_TNB)]  # fmt: skip
    largest, sums, squares = zip(*parts, strict=True)
    return torch.cat(largest), torch.stack([torch.stack(sums).sum(dim=0), torch.stack(squares).sum(dim=0)])


def _outliers(h_TNB: torch.Tensor, largest_TN: torch.Tensor) -> Outliers:
    limit_T = OUTLIER_RATIO * largest_TN.median(dim=1).values
    row, block = (largest_TN > limit_T.unsqueeze(1)).nonzero(as_tuple=True)
    found_FB = h_TNB[row, block]
    which, value = (found_FB.abs() > limit_T[row].unsqueeze(1)).nonzero(as_tuple=True)
    places = (row[which] * h_TNB.shape[1] + block[which]) * BLOCK_WIDTH + value
    return Outliers(places, found_FB[which, value], limit_T)


def _places_by_chunk(h_TNB: torch.Tensor, outliers: Outliers) -> list[torch.Tensor]:
    """The outliers' places relative to the start of each of ``_chunks``."""
    if _rows_at_once(h_TNB) >= len(h_TNB):
        return [outliers.places]
    size = _rows_at_once(h_TNB) * h_TNB[0].numel()
    chunk = outliers.places // size
    counts = torch.bincount(chunk, minlength=math.ceil(h_TNB.numel() / size)).tolist()
    return list((outliers.places - chunk * size).split(counts))  # type: ignore[no-untyped-call]


def _channels(sums_2C: torch.Tensor, rows: int, outliers: Outliers) -> Channels | None:
    """Mean and spread (standard deviation) of each channel without its outliers; None below ``NORMALIZED_ROWS``.

    The spread of a nearly constant channel is raised to cover the rounding of its mean.
    """
    if rows < NORMALIZED_ROWS:
        return None
    width, places = sums_2C.shape[1], outliers.places % sums_2C.shape[1]
    gone_2C = sums_2C.new_zeros(2, width).index_add_(
        1, places, torch.stack([outliers.values, outliers.values.square()])
    )
    mean_C, square_C = (sums_2C - gone_2C) / rows
    spread_C = (square_C - mean_C.square()).clamp_min(0).sqrt()
    spread_C = torch.maximum(spread_C, mean_C.abs() / 64).clamp_min(SMALLEST_SCALE)
    return mean_C.to(torch.bfloat16), spread_C.to(torch.bfloat16)


def _normalized(part_TNB: torch.Tensor, channels: Channels | None) -> torch.Tensor:
    """A copy of the chunk with normalized channels; a plain copy if ``channels`` is None."""
    if channels is None:
        return part_TNB.clone()
    mean_C, spread_C = channels
    return (part_TNB.flatten(1) - mean_C.float()).mul_(1 / spread_C.float()).view(part_TNB.shape)


def _bytes(pieces: tuple[torch.Tensor, ...], device: torch.device) -> bytes:
    """The concatenated bytes. They are joined on the device, so that one copy brings them to the CPU."""
    plain = [piece.to(device).contiguous().view(-1).view(torch.uint8) for piece in pieces if piece.numel()]
    return torch.cat(plain).cpu().numpy().tobytes()
