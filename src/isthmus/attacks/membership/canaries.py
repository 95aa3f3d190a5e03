"""Canaries: random secrets put among a silo's rows, and how much the trained model gives them away.

Exposure, after Carlini et al., "The Secret Sharer" (USENIX Security 2019): log2 of the number of secrets that there
could have been, less log2 of the rank that the true one has among them by loss. About 1: no better than guessing;
log2(secrets): the model prefers it to every other.

Who has this: whoever has the final adapters and the public base model (an outsider, any silo, the root) can compute
losses; the auditor, who planted the canaries, knows the true ones.
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

Row = TypeVar("Row")


@dataclass(frozen=True)
class Canary:
    """A text with gaps, the alphabet that fills them, and one secret filling.

    Args:
        text: with ``{secret}`` where the secret goes.
        alphabet: what each of its symbols is drawn from.
        length: symbols of the secret.
        separator: between symbols.
    """

    text: str
    alphabet: tuple[str, ...]
    length: int
    secret: tuple[str, ...]
    separator: str = " "

    @property
    def space(self) -> int:
        """How many secrets there could have been."""
        secrets: int = len(self.alphabet) ** self.length
        return secrets

    def filled(self, secret: Sequence[str] | None = None) -> str:
        """The text with this secret; None: the true one."""
        return self.text.replace("{secret}", self.separator.join(self.secret if secret is None else secret))

    def others(self, count: int, seed: int = 0) -> list[tuple[str, ...]]:
        """Secrets that it could have been: all but the true one if ``count`` allows, else distinct random ones."""
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
        DataError: the text has no gap, or there is no choice of secrets.
    """
    if "{secret}" not in text or len(set(alphabet)) < 2 or length < 1:
        raise DataError("a canary without a secret", remedy="put {secret} into its text and give two symbols or more")
    symbols = tuple(dict.fromkeys(alphabet))
    secret = tuple(random.Random(f"secret/{seed}").choices(symbols, k=length))
    return Canary(text, symbols, length, secret, separator)


def planted(rows: Sequence[Row], canary: Row, times: int, *, seed: int = 0) -> list[Row]:
    """The rows with the canary's among them, so many times, in random places."""
    mixed = [*rows, *[canary] * times]
    random.Random(f"places/{seed}").shuffle(mixed)
    return mixed


def exposure(true_loss: float, other_losses: Sequence[float], space: int) -> float:
    """Bits of the secret that the losses give away.

    With losses of all other secrets the rank is exact. With a sample, ranks beyond it are read off a skew-normal
    distribution fitted to the losses, as the paper does; at most log2(space).

    Args:
        true_loss: of the text with the true secret, by the trained model.
        other_losses: with other secrets.
        space: how many secrets there could have been.

    Raises:
        DataError: no other loss, more than there are other secrets, or a loss that is not finite.
    """
    others = np.asarray(other_losses, dtype=np.float64)
    if not 0 < len(others) < space or not np.isfinite([true_loss, *others]).all():
        raise DataError(
            f"{len(others)} other losses for {space} secrets", remedy="give finite losses of at most all other secrets"
        )
    rank = 1 + int((others < true_loss).sum())
    if len(others) == space - 1:
        return math.log2(space) - math.log2(rank)
    if rank > 1:
        return math.log2(len(others) + 1) - math.log2(rank)
    below = float(skewnorm.cdf(true_loss, *skewnorm.fit(others)))
    tail = -math.log2(max(below, 1e-300))
    return min(max(tail, math.log2(len(others) + 1)), math.log2(space))
