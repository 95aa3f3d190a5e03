"""Readers: small networks that guess tokens from what crosses. The silo trains them for itself; they never leave it.

Shapes: T vectors that cross, W their width, N of them that are asked about, K tokens to tell the right one from,
V vocabulary, E width of the embedding.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from isthmus.model.device import CPU

HIDDEN = 256
OTHERS = 512
"""Tokens drawn at random that right ones are told from."""
UNSEEN = 0.02
"""Occurrences that a token is taken to have had before it is seen."""


@dataclass(frozen=True, eq=False)
class Question:
    """Which token belongs to each of some vectors."""

    places_N: torch.Tensor
    tokens_N: torch.Tensor
    told_K: torch.Tensor
    """Among which tokens: sorted, without repeats, the right ones in it."""

    @classmethod
    def of(
        cls, places: list[int], tokens: list[int], vocabulary: int, draw: random.Random, device: torch.device = CPU
    ) -> Question:
        """With other tokens drawn at random."""
        others = draw.choices(range(vocabulary), k=OTHERS)
        asked = (places, tokens, sorted({*tokens, *others}))
        return cls(*(torch.tensor(numbers, device=device) for numbers in asked))


class Reader(nn.Module):
    """Scores tokens for a vector: a perceptron that points into the embedding, beside how often tokens occurred.

    Args:
        table_VE: the embedding; it does not train.
    """

    def __init__(self, width: int, table_VE: torch.Tensor) -> None:
        super().__init__()
        self.counts_V: torch.Tensor
        self._table = [table_VE / table_VE.square().sum(dim=1).mean().sqrt()]  # a list hides it from the state
        self._into, self._out = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, table_VE.shape[1])
        self.register_buffer("counts_V", torch.full((len(table_VE),), UNSEEN))
        nn.init.zeros_(self._out.weight)
        nn.init.zeros_(self._out.bias)

    def hear(self, question: Question) -> None:
        """Count the question's tokens among those that occur."""
        self.counts_V.index_add_(0, question.tokens_N, torch.ones_like(question.tokens_N, dtype=torch.float32))

    def scores(self, z_NW: torch.Tensor, told_K: torch.Tensor) -> torch.Tensor:
        """Of these tokens for each vector, ``[N, K]``."""
        pointed_NE = self._out(nn.functional.gelu(self._into(z_NW)))
        scores_NK: torch.Tensor = pointed_NE @ self._table[0][told_K].T + self.counts_V[told_K].log()
        return scores_NK

    def loss(self, z_TW: torch.Tensor, question: Question) -> torch.Tensor:
        """Mean cross-entropy of the right tokens, in nats."""
        scores_NK = self.scores(z_TW[question.places_N], question.told_K)
        return cross_entropy(scores_NK, torch.searchsorted(question.told_K, question.tokens_N))

    def blind(self, question: Question) -> torch.Tensor:
        """The same without the vectors, by frequency alone."""
        scores_NK = self.counts_V[question.told_K].log().expand(len(question.tokens_N), -1)
        return cross_entropy(scores_NK, torch.searchsorted(question.told_K, question.tokens_N))
