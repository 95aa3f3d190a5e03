"""Linear maps that make an update's numbers fewer, the same for all silos of a round: what crosses can be summed first
and taken back to full length afterwards, under masks too.

They are drawn from the recipe's seed and the round's number, which every party knows, so none is sent. Every
projection comes back orthogonally (``scale`` 1), which never enlarges what it is given, as error feedback needs; or,
without feedback, enlarged so that the mean over all draws is the input. With feedback the latter would diverge: what
is left of a row would be larger than the row.

Shapes: P parameters, C of them filled up to whole blocks, K numbers that cross.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

BLOCK = 256
"""Numbers that a sketch mixes with one another."""


class Projection(Protocol):
    """P numbers as K, and back."""

    @property
    def size(self) -> int:
        """K."""
        ...

    def project(self, row_P: torch.Tensor) -> torch.Tensor:
        """The numbers that cross of this row, K; linear."""
        ...

    def lift(self, values_K: torch.Tensor) -> torch.Tensor:
        """The row, P, for which these numbers, or sums of them, stand; linear, in their dtype."""
        ...


@dataclass(frozen=True)
class RandomK:
    """The numbers at these places (Konečný et al. 2016, random masks)."""

    total: int
    places_K: torch.Tensor
    scale: float

    @property
    def size(self) -> int:
        return len(self.places_K)

    def project(self, row_P: torch.Tensor) -> torch.Tensor:
        return row_P[self.places_K]

    def lift(self, values_K: torch.Tensor) -> torch.Tensor:
        row_P = values_K.new_zeros(self.total)
        row_P[self.places_K] = values_K * self.scale
        return row_P


@dataclass(frozen=True)
class Sketch:
    """Random-k of what a random rotation made of the row: signs at random, then a Hadamard transform of each block
    (the subsampled randomized Hadamard transform, Ailon and Chazelle 2009; as a sketch of gradients Suresh et al. 2017,
    in place of FetchSGD's count sketch, Rothchild et al. 2020).

    With the same K its error is random-k's. But the numbers that cross are of one size whatever the row's are, so that
    one range, and few bits, serve them all.
    """

    total: int
    signs_C: torch.Tensor
    chosen: RandomK

    @property
    def size(self) -> int:
        return self.chosen.size

    def project(self, row_P: torch.Tensor) -> torch.Tensor:
        row_C = torch.nn.functional.pad(row_P, (0, len(self.signs_C) - self.total))
        return self.chosen.project(_mixed(row_C * self.signs_C))

    def lift(self, values_K: torch.Tensor) -> torch.Tensor:
        row_C = _mixed(self.chosen.lift(values_K)) * self.signs_C
        return row_C[: self.total]


def random_k(total: int, kept: int, seed: int, round: int, *, unbiased: bool) -> RandomK:
    """The places of this round: the next K of a random order of all, so that each has its turn every P / K rounds.

    Args:
        total, kept: P and K.
        unbiased: enlarge what comes back.
    """
    turn, slot = divmod(round - 1, math.ceil(total / kept))
    order_P = np.argsort(_drawn(total, "order", seed, turn), kind="stable")
    places_K = order_P.take(np.arange(slot * kept, (slot + 1) * kept), mode="wrap")
    return RandomK(total, torch.from_numpy(places_K), total / kept if unbiased else 1.0)


def sketch(total: int, kept: int, seed: int, round: int, *, unbiased: bool) -> Sketch:
    """The sketch of this round; as for ``random_k``. All rounds of a turn have one rotation."""
    full = math.ceil(total / BLOCK) * BLOCK
    turn = (round - 1) // math.ceil(full / kept)
    bits_C = _drawn(full, "signs", seed, turn) >> 31
    signs_C = torch.from_numpy(1.0 - 2.0 * bits_C.astype(np.float32))
    return Sketch(total, signs_C, random_k(full, kept, seed, round, unbiased=unbiased))


def _drawn(count: int, purpose: str, seed: int, turn: int) -> np.ndarray:
    """Random 32-bit numbers, the same in every version of every library."""
    key = hashlib.sha256(f"{purpose} {seed} {turn}".encode()).digest()
    return np.frombuffer(Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * count)), "<u4")


def _mixed(row_C: torch.Tensor) -> torch.Tensor:
    """Each block's orthonormal Hadamard transform, its own inverse."""
    return (row_C.view(-1, BLOCK) @ _hadamard().to(row_C.dtype)).view(-1)


@cache
def _hadamard() -> torch.Tensor:
    """Sylvester's Hadamard matrix, ``BLOCK`` × ``BLOCK``, scaled to be orthogonal; fp64."""
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < BLOCK:
        signs = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), signs)
    return signs / math.sqrt(BLOCK)
