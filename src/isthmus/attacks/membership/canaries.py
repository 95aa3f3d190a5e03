"""Canaries: random secrets among a silo's training rows, and their exposure by the trained model.

Exposure (Carlini et al., "The Secret Sharer", USENIX Security 2019) is log2 of the number of possible secrets minus
log2 of the true secret's rank among them by loss. About 1 means no memorization. The largest value, log2 of the number
of possible secrets, means that the true secret has the lowest loss.

Adversary: anyone with the final adapters and the public base model (an outsider, a silo, the root) can compute losses.
The auditor, who has inserted the canaries, knows the true secrets.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.stats import skewnorm

from isthmus.errors import DataError

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Canary:
    """A text with a random secret.

    Args:
        text: the text, with ``{secret}`` in the secret's place.
        alphabet: the possible symbols.
        length: number of symbols of a secret.
        secret: the true secret's symbols.
        separator: text between two symbols.
    """

    text: str
    alphabet: tuple[str, ...]
    length: int
    secret: tuple[str, ...]
    separator: str = " "

    @property
    def space(self) -> int:
        """Number of possible secrets."""
        secrets: int = len(self.alphabet) ** self.length
        return secrets

    def filled(self, secret: Sequence[str] | None = None) -> str:
        """The text with a secret; None: the true secret."""
        return self.text.replace("{secret}", self.separator.join(self.secret if secret is None else secret))

    def others(self, count: int, seed: int = 0) -> list[tuple[str, ...]]:
        """Possible secrets except the true one: all of them if there are at most ``count``, else ``count`` distinct
        random ones."""
        if count >= self.space - 1:
            every = [self._numbered(number) for number in range(self.space)]
            return [secret for secret in every if secret != self.secret]
        draw, drawn = random.Random(f"others/{seed}"), dict[tuple[str, ...], None]()
        while len(drawn) < count:
            secret = tuple(draw.choices(self.alphabet, k=self.length))
            if secret != self.secret:
                drawn[secret] = None
        return list(drawn)

    def _numbered(self, number: int) -> tuple[str, ...]:
        symbols = []
        for _ in range(self.length):
            number, digit = divmod(number, len(self.alphabet))
            symbols.append(self.alphabet[digit])
        return tuple(symbols)


def draw_canary(text: str, alphabet: Sequence[str], length: int, *, seed: int, separator: str = " ") -> Canary:
    """A canary with a random secret.

    Raises:
        DataError: the text lacks ``{secret}``, the alphabet has fewer than two symbols, or ``length`` is below 1.
    """
    if "{secret}" not in text or len(set(alphabet)) < 2 or length < 1:
        raise DataError("a canary without a secret", remedy="put {secret} into its text and give at least two symbols")
    symbols = tuple(dict.fromkeys(alphabet))
    secret = tuple(random.Random(f"secret/{seed}").choices(symbols, k=length))
    return Canary(text, symbols, length, secret, separator)


def insert_canary(rows: Sequence[_Row], canary: _Row, times: int, *, seed: int = 0) -> list[_Row]:
    """The rows and ``times`` copies of the canary's row, shuffled."""
    mixed = [*rows, *[canary] * times]
    random.Random(f"places/{seed}").shuffle(mixed)
    return mixed


def exposure(true_loss: float, other_losses: Sequence[float], space: int) -> float:
    """Exposure of a secret in bits, 0 to log2(``space``).

    With the losses of all other secrets the rank is exact. With a sample of them, a rank below the whole sample is
    extrapolated by a skew-normal distribution fitted to the losses, as in the paper.

    Args:
        true_loss: the trained model's loss of the text with the true secret.
        other_losses: its losses of the text with other secrets.
        space: number of possible secrets.

    Raises:
        DataError: no other loss, more of them than other secrets, or a loss that is not finite.
    """
    others = np.asarray(other_losses, dtype=np.float64)
    if not 0 < len(others) < space or not np.isfinite([true_loss, *others]).all():
        raise DataError(
            f"{len(others)} other losses for {space} secrets",
            remedy="give finite losses of at least one and at most all other secrets",
        )
    rank = 1 + int((others < true_loss).sum())
    if len(others) == space - 1:
        return math.log2(space) - math.log2(rank)
    if rank > 1:
        return math.log2(len(others) + 1) - math.log2(rank)
    below = float(skewnorm.cdf(true_loss, *skewnorm.fit(others)))
    tail = -math.log2(max(below, 1e-300))
    return min(max(tail, math.log2(len(others) + 1)), math.log2(space))
