"""Sources of random noise: a stream cipher keyed by the operating system for releases, seeded generators for tests.

Shapes: T rows, D width.
"""

from __future__ import annotations

import math
import os
import secrets
import threading
import weakref
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

FRACTION = 2**53 - 1
"""Mask of the 53 random bits that a float64 between 0 and 1 takes."""
Words = npt.NDArray[np.uint64]


class Noise(Protocol):
    """A source of independent random draws on the CPU; real numbers are float32."""

    def normal(self, rows: int, width: int) -> torch.Tensor:
        """Standard normal draws, ``[T, D]``."""
        ...

    def gamma(self, rows: int, shape: int) -> torch.Tensor:
        """Draws of the Gamma distribution with this integer shape and scale 1, ``[T]``."""
        ...

    def words(self, count: int) -> Words:
        """Uniform 64-bit integers, ``[count]``."""
        ...


class SecretNoise:
    """Draws from the keystream of AES-256 in counter mode, under a random key that exists in this object only.

    Predicting a draw from any number of others requires breaking AES. Torch's generators (Mersenne Twister, Philox)
    give no such guarantee. Normal draws use the Box-Muller transform with 53 bits for the radius and 32 for the angle,
    so tails reach 8.6 deviations (probability 1e-17 beyond); 32 bits would cut them at 6.7.

    Limitation: ``normal`` and ``gamma`` are floating-point numbers. Mironov (2012) shows that the exact sum of such a
    draw and a tensor can reveal more than the real-valued mechanism does, in the lowest bits of the fraction.
    Mechanisms with a clip therefore add whole steps of a grid, drawn from ``words`` (``discrete``).
    """

    def __init__(self) -> None:
        self.rekey()
        _secret_noises.add(self)

    def rekey(self) -> None:
        """Draw from a new key from here on. A forked child does so by itself, or it would repeat its parent's draws."""
        key, start = secrets.token_bytes(32), secrets.token_bytes(16)
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(start)).encryptor()
        self._lock = threading.Lock()  # a new one: at a fork, another thread may have held the old one

    def normal(self, rows: int, width: int) -> torch.Tensor:
        pairs = -(-rows * width // 2)
        bits = self._bytes(12 * pairs)
        radius = _uniform(bits, pairs).log_().mul_(-2).sqrt_().to(torch.float32)
        angle = torch.frombuffer(bits, dtype=torch.int32, count=pairs, offset=8 * pairs).to(torch.float32)
        angle.mul_(math.pi * 2**-31)
        drawn = torch.cat([radius * angle.cos(), radius.mul_(angle.sin())])
        return drawn[: rows * width].view(rows, width)

    def gamma(self, rows: int, shape: int) -> torch.Tensor:
        """Draws of the Gamma distribution with this integer shape and scale 1, ``[T]``: sums of exponential draws."""
        drawn = _uniform(self._bytes(8 * rows * shape), rows * shape)
        return drawn.log_().neg_().view(rows, shape).sum(dim=1).to(torch.float32)

    def words(self, count: int) -> Words:
        return np.frombuffer(self._bytes(8 * count), "<u8", count)

    def _bytes(self, count: int) -> bytearray:
        drawn = bytearray(count + 16)
        with self._lock:  # several generations may run at once, and a cipher refuses a second thread
            self._cipher.update_into(bytes(count), drawn)
        return drawn


class SeededNoise:
    """Reproducible draws of a seeded torch generator, for tests and simulations. Never use it for a release."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def normal(self, rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=self._generator, device=self._generator.device).cpu()

    def gamma(self, rows: int, shape: int) -> torch.Tensor:
        drawn = torch.empty(rows, shape, device=self._generator.device).exponential_(generator=self._generator)
        return drawn.sum(dim=1).cpu()

    def words(self, count: int) -> Words:
        device = self._generator.device
        drawn = torch.randint(2**32, (count, 2), generator=self._generator, device=device, dtype=torch.int64)
        return drawn.cpu().numpy().astype("<u4").view("<u8").reshape(count)


class SecretGenerator(torch.Generator):
    """A torch generator that can be found again after a fork: some versions of torch keep no weak references to their
    own."""


def secret_generator(device: torch.device | str = "cpu") -> SecretGenerator:
    """A torch generator seeded by the operating system, for draws that need not be secret, such as random rounding."""
    generator = SecretGenerator(device)
    generator.manual_seed(secrets.randbits(63))
    _secret_generators.add(generator)
    return generator


_secret_noises: weakref.WeakSet[SecretNoise] = weakref.WeakSet()
_secret_generators: weakref.WeakSet[SecretGenerator] = weakref.WeakSet()


def _part_from_parent() -> None:
    """In a forked child: give every source of its own draws, other than the parent's."""
    for noise in _secret_noises:
        noise.rekey()
    for generator in _secret_generators:
        if generator.device.type == "cpu":  # CUDA cannot be used in a forked child at all
            generator.manual_seed(secrets.randbits(63))


os.register_at_fork(after_in_child=_part_from_parent)


def _uniform(bits: bytearray, count: int) -> torch.Tensor:
    """Uniform draws strictly between 0 and 1 in steps of 2⁻⁵³, float64 ``[count]``."""
    whole = torch.frombuffer(bits, dtype=torch.int64, count=count).bitwise_and(FRACTION)
    return whole.to(torch.float64).add_(0.5).mul_(2.0**-53)
