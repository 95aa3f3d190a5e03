"""Readers: small networks that predict tokens from the vectors that cross. They are trained and stay in the silo.

Shapes: T vectors that cross, W their width, N vectors with a target, K candidate tokens, V vocabulary, E width of the
embedding.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from isthmus.model.device import CPU

HIDDEN = 256
"""Width of the perceptron's hidden layer."""
NEGATIVES = 512
"""Number of random tokens among the candidates."""
PRIOR_COUNT = 0.02
"""Initial count of every token."""


@dataclass(frozen=True, eq=False)
class Question:
    """A classification task for a reader: the right token of each of N vectors among K candidates."""

    positions_N: torch.Tensor
    """Indices of the vectors, int64."""
    tokens_N: torch.Tensor
    """The right token of each, int64."""
    candidates_K: torch.Tensor
    """The candidate tokens, sorted and distinct; they include the right ones."""

    @classmethod
    def of(
        cls, positions: list[int], tokens: list[int], vocabulary: int, draw: random.Random, device: torch.device = CPU
    ) -> Question:
        """A question whose candidates are the right tokens and ``NEGATIVES`` random ones.

        Args:
            vocabulary: number of tokens to draw from.
        """
        others = draw.choices(range(vocabulary), k=NEGATIVES)
        fields = (positions, tokens, sorted({*tokens, *others}))
        return cls(*(torch.tensor(numbers, device=device) for numbers in fields))


class Reader(nn.Module):
    """Scores tokens for a vector: the product of a perceptron's output and the token embedding, plus log frequency.

    Args:
        width: width of the vectors, W.
        table_VE: the token embedding; it does not train.
    """

    def __init__(self, width: int, table_VE: torch.Tensor) -> None:
        super().__init__()
        self.counts_V: torch.Tensor
        self._table = [table_VE / table_VE.square().sum(dim=1).mean().sqrt()]  # a list hides it from the state
        self._into, self._out = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, table_VE.shape[1])
        self.register_buffer("counts_V", torch.full((len(table_VE),), PRIOR_COUNT))
        nn.init.zeros_(self._out.weight)
        nn.init.zeros_(self._out.bias)

    def count(self, question: Question) -> None:
        """Add the question's right tokens to the token counts."""
        self.counts_V.index_add_(0, question.tokens_N, torch.ones_like(question.tokens_N, dtype=torch.float32))

    def scores(self, z_NW: torch.Tensor, candidates_K: torch.Tensor) -> torch.Tensor:
        """Scores (logits) of the candidates for each vector, ``[N, K]``."""
        pointed_NE = self._out(nn.functional.gelu(self._into(z_NW)))
        scores_NK: torch.Tensor = pointed_NE @ self._table[0][candidates_K].T + self.counts_V[candidates_K].log()
        return scores_NK

    def loss(self, z_TW: torch.Tensor, question: Question) -> torch.Tensor:
        """Mean cross-entropy of the right tokens among the candidates, in nats."""
        scores_NK = self.scores(z_TW[question.positions_N], question.candidates_K)
        return cross_entropy(scores_NK, torch.searchsorted(question.candidates_K, question.tokens_N))

    def frequency_loss(self, question: Question) -> torch.Tensor:
        """Mean cross-entropy of the right tokens by token frequency alone, without the vectors, in nats."""
        scores_NK = self.counts_V[question.candidates_K].log().expand(len(question.tokens_N), -1)
        return cross_entropy(scores_NK, torch.searchsorted(question.candidates_K, question.tokens_N))
