"""Fixed point: real numbers as elements of a ring, so that the sum of what many silos encode is exact.

A value in [-range, range] becomes one of 2·levels + 1 whole numbers, rounded at random so that its mean is unbiased.
Whole numbers are added modulo 2^(8·width); as the sum of all silos' numbers lies between the ring's ends, it is the sum
over the integers, whoever adds it in which order. Bonawitz et al. (2017) do likewise.

Shapes: P parameters, S digits of a share.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from isthmus.errors import FrameError, RecipeError

Whole = npt.NDArray[np.uint32]
"""Ring elements in 32 bits, of which the low ones count: a sum modulo 2^32 is one modulo any smaller power of two."""
Integers = npt.NDArray[np.int64]
WIDTHS = (1, 2, 3, 4)
BITS = 16
SHARE_BITS = 15
"""What a silo weighs is at least so fine, however few bits its other numbers have."""


@dataclass(frozen=True)
class Ring:
    """How numbers are written, for sums of at most so many silos.

    Args:
        silos: most numbers that are added.
        range: largest absolute value; what is larger is clipped to it.
        bits: of one silo's number, sign and all.
        spare: how much larger noise may make a sum, in whole numbers.
    """

    silos: int
    range: float
    bits: int = BITS
    spare: int = 0

    def __post_init__(self) -> None:
        if not self.most(self.silos) < 2 ** (8 * WIDTHS[-1] - 1):
            noise = " and their noise" if self.spare else ""
            raise RecipeError(
                f"the sum of {self.silos:,} silos' {self.bits}-bit numbers{noise} does not fit into "
                f"{8 * WIDTHS[-1]} bits",
                remedy="put edges between the silos and the root, or use fewer bits",
            )

    @property
    def levels(self) -> int:
        """Whole numbers on each side of zero."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def step(self) -> float:
        """What one whole number stands for."""
        return self.range / self.levels

    def most(self, silos: float) -> float:
        """The largest size of an element of the sum of so many silos' numbers."""
        return silos * self.levels + self.spare

    @property
    def width(self) -> int:
        """Bytes of an element: the fewest in which no sum of all silos overflows, silos · levels < 2^(8·width - 1)."""
        return next(width for width in WIDTHS if self.most(self.silos) < 2 ** (8 * width - 1))

    def encode(self, values_P: npt.NDArray[np.float32], draw: np.random.Generator | None = None) -> Whole:
        """The ring elements of these values.

        Args:
            draw: of the rounding; seeded afresh by default.
        """
        draw = draw or np.random.default_rng(secrets.randbits(128))
        whole_P = draw.random(len(values_P), dtype=np.float32)
        whole_P += values_P * np.float32(self.levels / self.range)
        np.floor(whole_P, out=whole_P)
        np.clip(whole_P, -self.levels, self.levels, out=whole_P)
        return whole_P.astype(np.int32).view(np.uint32)

    def encode_short(self, values_P: npt.NDArray[np.float32], bound: float) -> Whole:
        """The ring elements of these values, of which none is clipped: no longer than ``bound``, as whole numbers.

        Rounded again at random until they are so short (Kairouz, Liu and Steinke 2021, conditional rounding). Whole
        numbers are measured, so no floating point is wrong of it.
        """
        while True:
            whole_P = self.encode(values_P)
            signed_P = whole_P.view(np.int32).astype(np.float64)  # squares of 16 bits add up exactly
            if signed_P @ signed_P <= bound**2:
                return whole_P

    def side(self, within: bool) -> Whole:
        """One element that says whether an update was within its clip."""
        return np.array([self.levels if within else -self.levels], np.int32).view(np.uint32)

    def whole(self, total_P: Whole) -> Integers:
        """The whole number that each element of a sum stands for."""
        spare = np.uint32(32 - 8 * self.width)
        return (np.left_shift(total_P, spare).view(np.int32) >> np.int32(spare)).astype(np.int64)

    def decode(self, total_P: Whole) -> npt.NDArray[np.float64]:
        """The sum of the values whose elements add up to this."""
        return self.whole(total_P).astype(np.float64) * (self.range / self.levels)

    @property
    def digits(self) -> int:
        """Elements that a share takes, S."""
        return math.ceil(SHARE_BITS / (self.bits - 1))

    def encode_share(self, share: float) -> Whole:
        """A number from 0 to 1, to the nearest of those that S digits to the base levels + 1 can say; S.

        No digit is above ``levels``, so that the sums of digits overflow no more than those of other numbers.
        """
        base = self.levels + 1
        left = round(share * (base**self.digits - 1))
        return np.array([left // base**place % base for place in range(self.digits)], np.uint32)

    def decode_share(self, total_S: Integers) -> float:
        """The sum of the shares whose digits add up to these."""
        base = self.levels + 1
        whole = sum(digit * base**place for place, digit in enumerate(total_S.tolist()))
        return float(whole / (base**self.digits - 1))

    def pack(self, whole_P: Whole) -> bytes:
        """``width`` little-endian bytes an element."""
        bytes_P4 = whole_P.astype("<u4", copy=False).view(np.uint8).reshape(-1, 4)
        packed = np.empty((len(whole_P), self.width), np.uint8)
        for place in range(self.width):  # many times faster than one copy of the slice
            packed[:, place] = bytes_P4[:, place]
        return packed.tobytes()

    def unpack(self, data: bytes, count: int) -> Whole:
        """The elements in these bytes.

        Raises:
            FrameError: another number of bytes than so many elements have.
        """
        if len(data) != count * self.width:
            raise FrameError(
                f"a masked update of {len(data)} bytes where {count * self.width} are due",
                remedy="both sides must run the same version of isthmus",
            )
        packed = np.frombuffer(data, np.uint8).reshape(count, self.width)
        bytes_P4 = np.zeros((count, 4), np.uint8)
        for place in range(self.width):
            bytes_P4[:, place] = packed[:, place]
        return bytes_P4.view("<u4").reshape(count).astype(np.uint32, copy=False)


def shortened(row_P: torch.Tensor, clip: float) -> tuple[npt.NDArray[np.float32], bool]:
    """This row no longer than the clip, and whether it was so before. What is no finite number is 0."""
    row_P = row_P.double().nan_to_num(0.0, 0.0, 0.0)
    norm = float(row_P.norm())
    return (row_P * min(1.0, clip / max(norm, 1e-30))).float().numpy(), norm <= clip
