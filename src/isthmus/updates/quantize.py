"""Fixed point: real numbers as whole ones, several to a word, so that the sum of what many silos encode is exact.

A value in [-range, range] becomes one of 2·levels + 1 whole numbers, rounded at random so that its mean is unbiased.
A word is Σ numberᵢ · 2^(digit·i). Words are added modulo 2^64; as each sum of all silos' numbers lies between a digit's
ends, the digits of the sum of words are the sums over the integers, whoever adds in which order. Bonawitz et al. (2017)
do likewise.

Shapes: P parameters, W words of them, S digits of a share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from isthmus.errors import DataError, FrameError, RecipeError
from isthmus.privacy.noise import Noise, SecretNoise

Whole = npt.NDArray[np.int32]
"""A silo's numbers."""
Words = npt.NDArray[np.uint64]
"""Elements of the ring, of which the low bits count: a sum modulo 2^64 is one modulo any smaller power of two."""
Integers = npt.NDArray[np.int64]
WORD, LONGEST = 64, 32
"""Bits of a word, and of a number in it at most."""
BITS = 16
ROUNDING_PIECE = 2**15
"""Numbers that are rounded before the next ones, so that they stay in the processor's cache."""
SHARE_BITS = 15
"""Bits of a silo's share at least, however few its other numbers have."""


@dataclass(frozen=True)
class Ring:
    """The ring in which the numbers of at most so many silos are summed.

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
        if self.digit > LONGEST:
            noise = " and their noise" if self.spare else ""
            raise RecipeError(
                f"the sum of {self.silos:,} silos' {self.bits}-bit numbers{noise} does not fit into {LONGEST} bits",
                remedy="put edges, or more of them, between the silos and the root, or use fewer bits",
            )

    @cached_property
    def levels(self) -> int:
        """The largest whole number of one silo; the smallest is its negative."""
        return int(2 ** (self.bits - 1)) - 1

    @cached_property
    def step(self) -> float:
        """The value of the whole number 1."""
        return self.range / self.levels

    def most(self, silos: float) -> float:
        """The largest size of an element of the sum of so many silos' numbers."""
        return silos * self.levels + self.spare

    @cached_property
    def digit(self) -> int:
        """Bits that a number takes in a word: the fewest in which no sum of all silos overflows."""
        return int(self.most(self.silos)).bit_length() + 1

    @cached_property
    def numbers(self) -> int:
        """Numbers in a word."""
        return WORD // self.digit

    @cached_property
    def width(self) -> int:
        """Bytes of a word that cross."""
        return math.ceil(self.numbers * self.digit / 8)

    def words(self, count: int) -> int:
        """Words that so many numbers take."""
        return math.ceil(count / self.numbers)

    def encode(
        self,
        values_P: npt.NDArray[np.float32],
        draws: Noise | None = None,
        *,
        times: float = 1.0,
        out: Whole | None = None,
    ) -> Whole:
        """The whole numbers for these values times a number.

        Args:
            draws: of the rounding; secret ones by default.
            out: where they are put.

        Raises:
            DataError: a value is NaN or infinite; as the largest number it would move everybody's parameters.
        """
        if not np.isfinite(values_P).all():
            raise DataError("an update is not finite", remedy="lower the learning rate: training has diverged")
        draws = draws or SecretNoise()
        whole_P = np.empty(len(values_P), np.int32) if out is None else out
        for start in range(0, len(values_P), ROUNDING_PIECE):
            piece = slice(start, start + ROUNDING_PIECE)
            self._round(values_P[piece], times, draws, whole_P[piece])
        return whole_P

    def _round(self, values_P: npt.NDArray[np.float32], times: float, draws: Noise, whole_P: Whole) -> None:
        """Add as many random bits as there are behind the point, then cut those off."""
        fine = min(16, 32 - self.bits)
        most = np.float32(self.levels * 2.0**fine)
        fixed_P = values_P * np.float32(times * most / self.range)
        np.clip(fixed_P, -most, most, out=fixed_P)
        np.rint(fixed_P, out=fixed_P)
        whole_P[:] = fixed_P
        random_P = draws.words(math.ceil(len(whole_P) / 4)).view("<u2")[: len(whole_P)]
        whole_P += random_P if fine == 16 else random_P >> (16 - fine)
        whole_P >>= fine

    def encode_short(self, values_P: npt.NDArray[np.float32], bound: float) -> Whole:
        """The whole numbers for these values, of which none is clipped: no longer than ``bound``, as whole numbers.

        Rounded again at random until they are so short (Kairouz, Liu and Steinke 2021, conditional rounding). Whole
        numbers are measured, so no floating point is wrong of it.
        """
        while True:
            whole_P = self.encode(values_P)
            exact_P = whole_P.astype(np.float64)  # squares of 16 bits add up exactly
            if exact_P @ exact_P <= bound**2:
                return whole_P

    def side(self, within: bool) -> Whole:
        """One number that says whether an update was within its clip."""
        return np.array([self.levels if within else -self.levels], np.int32)

    def decode(self, total_P: Whole | Integers) -> npt.NDArray[np.float64]:
        """The sum of the values whose whole numbers add up to these."""
        return total_P.astype(np.float64) * (self.range / self.levels)

    @cached_property
    def digits(self) -> int:
        """Numbers that a share takes, S."""
        return math.ceil(SHARE_BITS / (self.bits - 1))

    def encode_share(self, share: float) -> Whole:
        """A number from 0 to 1, to the nearest of those that S digits to the base levels + 1 can say; S.

        No digit is above ``levels``, so that the sums of digits overflow no more than those of other numbers.
        """
        base = self.levels + 1
        left = round(share * (base**self.digits - 1))
        return np.array([left // base**place % base for place in range(self.digits)], np.int32)

    def decode_share(self, total_S: Integers) -> float:
        """The sum of the shares whose digits add up to these."""
        base = self.levels + 1
        whole = sum(digit * base**place for place, digit in enumerate(total_S.tolist()))
        return float(whole / (base**self.digits - 1))

    def pack(self, whole_P: Whole | Integers) -> Words:
        """The words of these numbers, W. The first digits of all words come first, then the second ones."""
        words_W = np.zeros(count := self.words(len(whole_P)), np.int64)
        for number in reversed(range(self.numbers)):
            digits = whole_P[number * count : (number + 1) * count]
            words_W <<= self.digit
            words_W[: len(digits)] += digits  # a negative one borrows from the next digit
        return words_W.view(np.uint64)

    def unpack(self, words_W: Words, count: int) -> Integers:
        """The numbers, or sums of them, in these words."""
        half = 1 << (self.digit - 1)
        raised_W = words_W + np.uint64(sum(half << (number * self.digit) for number in range(self.numbers)))
        total = np.empty((self.numbers, len(words_W)), np.int64)
        for number in range(self.numbers):  # all digits are positive now, and none borrows
            np.right_shift(raised_W, np.uint64(number * self.digit), out=total[number].view(np.uint64))
        total &= 2 * half - 1
        total -= half
        return total.reshape(-1)[:count]

    def written(self, words_W: Words) -> bytes:
        """``width`` little-endian bytes a word."""
        bytes_W8 = words_W.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)
        if self.width == 8:
            return bytes_W8.tobytes()
        written = np.empty((len(words_W), self.width), np.uint8)
        for place in range(self.width):  # many times faster than one copy of the slice
            written[:, place] = bytes_W8[:, place]
        return written.tobytes()

    def read(self, data: bytes, count: int) -> Words:
        """The words in these bytes, of so many numbers.

        Raises:
            FrameError: another number of bytes than so many numbers take.
        """
        if len(data) != (expected := self.words(count) * self.width):
            raise FrameError(
                f"a masked update of {len(data)} bytes, {expected} expected",
                remedy="both sides must run the same version of isthmus",
            )
        if self.width == 8:
            return np.frombuffer(data, "<u8").astype(np.uint64, copy=False)
        read = np.frombuffer(data, np.uint8).reshape(-1, self.width)
        bytes_W8 = np.zeros((len(read), 8), np.uint8)
        for place in range(self.width):
            bytes_W8[:, place] = read[:, place]
        return bytes_W8.view("<u8").reshape(-1).astype(np.uint64, copy=False)


def shortened(row_P: torch.Tensor, clip: float) -> tuple[npt.NDArray[np.float32], bool]:
    """This row no longer than the clip, and whether it was so before. What is no finite number is 0."""
    row_P = row_P.double().nan_to_num(0.0, 0.0, 0.0)
    norm = float(row_P.norm())
    return (row_P * min(1.0, clip / max(norm, 1e-30))).float().numpy(), norm <= clip
