"""The transformer inverter, a learned attack: it reads all vectors of a row and scores the token of each vector.

It starts as the linear inverter and learns a correction of its scores, so on the rows that select the epoch it is never
worse. It is trained on the adversary's own rows after the same boundary, so it knows the defence by example.

Shapes: B rows, L vectors of the longest, T vectors of all rows, D width of a crossing vector, E width of the embedding,
M width of the inverter, K candidates, V vocabulary.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from isthmus.attacks.inversion.linear import VECTORS_A_PASS, LinearInverter
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import KnownPair

_Item = TypeVar("_Item")
HELD_OUT_SHARE = 0.08
"""Share of the own rows that select the best epoch."""
RANDOM_CANDIDATES = 4096
"""Random tokens among which the linear inverter's candidates are chosen, beside the own rows' tokens."""
EMBEDDED_POSITIONS = 2048
"""Positions with an own embedding; later ones share the last."""


@dataclass(frozen=True)
class InverterSettings:
    """Size and training of the inverter."""

    epochs: int = 8
    rows: int = 16
    """Rows per step."""
    learning_rate: float = 1e-3
    width: int = 256
    blocks: int = 2
    heads: int = 4
    candidates: int = 24
    """The linear inverter's best tokens at a vector, which the loss compares with the right token."""
    others: int = 512
    """Random tokens per step, which the loss compares with the right token too."""
    seed: int = 0


def invert_by_transformer(knowledge: Knowledge, training: InverterSettings = InverterSettings()) -> list[list[int]]:
    """The likeliest token at every vector of every sequence in the view, in the view's order.

    Raises:
        AttackError: the view has no crossings or no own rows.
    """
    crossings = knowledge.view.needs("crossings", "pairs").crossings
    inverter = train_inverter(knowledge, training)
    return [inverter.tokens(crossing.hidden_LD.float()) for crossing in crossings]


class Inverter(nn.Module):
    """Scores of every token: the linear inverter's plus a correction by a bidirectional transformer over the row.

    Args:
        z_TD: own vectors, for standardization.
    """

    def __init__(
        self, linear: LinearInverter, z_TD: torch.Tensor, embedding_VE: torch.Tensor, training: InverterSettings
    ) -> None:
        super().__init__()
        self.linear = linear
        self._embedding_VE = embedding_VE / embedding_VE.square().mean().sqrt()
        self._mean_D, self._scale_D = z_TD.mean(dim=0), z_TD.std(dim=0).clamp_min(1e-6)
        self._into = nn.Linear(z_TD.shape[1], training.width)
        self._positions = nn.Embedding(EMBEDDED_POSITIONS, training.width)
        block = nn.TransformerEncoderLayer(
            training.width,
            training.heads,
            4 * training.width,
            dropout=0.1,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self._blocks = nn.TransformerEncoder(block, training.blocks, enable_nested_tensor=False)
        self._norm = nn.LayerNorm(training.width)
        self._out = nn.Linear(training.width, embedding_VE.shape[1])
        self._log_scale = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self._out.weight)
        nn.init.zeros_(self._out.bias)
        nn.init.normal_(self._positions.weight, std=0.02)

    def directions(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """The correction of the scores as a direction in the embedding space, ``[T, E]``."""
        z_BLD = pad_sequence([(row - self._mean_D) / self._scale_D for row in rows], batch_first=True)
        real_BL = torch.arange(z_BLD.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
        positions_L = torch.arange(z_BLD.shape[1]).clamp_max(EMBEDDED_POSITIONS - 1)
        x_BLM = self._blocks(self._into(z_BLD) + self._positions(positions_L), src_key_padding_mask=~real_BL)
        out_TE: torch.Tensor = self._out(self._norm(x_BLM[real_BL]))
        return out_TE

    def scores(self, linear_TK: torch.Tensor, out_TE: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Scores of ``tokens``, ``[T, K]``.

        Args:
            linear_TK: the linear inverter's scores of them.
            out_TE: result of ``directions``.
            tokens: ``[K]``, the same for all vectors, or ``[T, K]``.
        """
        chosen = self._embedding_VE[tokens]
        added = out_TE @ chosen.T if tokens.ndim == 1 else torch.einsum("te,tke->tk", out_TE, chosen)
        return linear_TK * self._log_scale.exp() + added

    @torch.no_grad()
    def tokens(self, z_LD: torch.Tensor) -> list[int]:
        """The best token of the whole vocabulary at each vector."""
        vocabulary_V = torch.arange(len(self._embedding_VE))
        best: list[int] = []
        for z_TD, out_TE in zip(
            *(torch.split(one, VECTORS_A_PASS) for one in (z_LD, self.directions([z_LD]))), strict=True
        ):
            best += self.scores(self.linear.scores(z_TD), out_TE, vocabulary_V).argmax(dim=1).tolist()
        return best


@dataclass(frozen=True, eq=False)
class InverterExample:
    """An own row with the linear inverter's candidates."""

    z_LD: torch.Tensor
    tokens_L: torch.Tensor
    candidates_LK: torch.Tensor
    scores_LK: torch.Tensor

    @classmethod
    def of(cls, pair: KnownPair, linear: LinearInverter, pool_K: torch.Tensor, count: int) -> InverterExample:
        """The example of an own row, with the ``count`` best tokens of a pool as candidates."""
        z_LD = pair.crossing.hidden_LD.float()
        best = linear.scores(z_LD, pool_K).topk(min(count, len(pool_K)), dim=1)
        return cls(z_LD, torch.tensor(pair.tokens[-len(z_LD) :]), pool_K[best.indices], best.values)


def train_inverter(knowledge: Knowledge, training: InverterSettings) -> Inverter:
    """An inverter trained on the view's own rows; the epoch with the most right tokens on held-out rows is kept."""
    linear, pairs = knowledge.linear, knowledge.view.pairs
    torch_state = torch.get_rng_state()
    torch.manual_seed(training.seed)
    try:
        pool_K = _pool(pairs, len(linear.prior_V))
        learned, held_out = split_held_out(
            [InverterExample.of(pair, linear, pool_K, training.candidates) for pair in pairs]
        )
        inverter = Inverter(linear, torch.cat([one.z_LD for one in learned]), knowledge.embedding, training)
        return _learned(inverter, learned, held_out, training)
    finally:
        torch.set_rng_state(torch_state)


def _learned(
    inverter: Inverter, learned: list[InverterExample], held_out: list[InverterExample], training: InverterSettings
) -> Inverter:
    steps = max(training.epochs, 1) * -(-len(learned) // training.rows)
    optimizer = torch.optim.AdamW(inverter.parameters(), lr=training.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, total_steps=steps, pct_start=0.1)
    best, kept = _recovered(inverter, held_out, training), copy.deepcopy(inverter.state_dict())
    draw = random.Random(training.seed)
    for _ in range(training.epochs):
        inverter.train()
        for batch in shuffled_batches(learned, training.rows, draw):
            optimizer.zero_grad()
            _loss(inverter, batch, training.others).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(inverter.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        recovered = _recovered(inverter, held_out, training)
        if recovered > best:
            best, kept = recovered, copy.deepcopy(inverter.state_dict())
    inverter.load_state_dict(kept)
    return inverter.eval()


def _loss(inverter: Inverter, batch: Sequence[InverterExample], others: int) -> torch.Tensor:
    """Cross-entropy of the right token among the linear inverter's candidates and random tokens."""
    return cross_entropy(*_contest(inverter, batch, others))


@torch.no_grad()
def _recovered(inverter: Inverter, rows: list[InverterExample], training: InverterSettings) -> float:
    """Share of vectors whose right token has the best score among candidates and random tokens."""
    inverter.eval()
    hits = 0.0
    for start in range(0, len(rows), training.rows):
        scores_TK, right_T = _contest(inverter, rows[start : start + training.rows], training.others)
        hits += float((scores_TK.argmax(dim=1) == right_T).sum())
    return hits / sum(len(one.z_LD) for one in rows)


def _contest(inverter: Inverter, batch: Sequence[InverterExample], others: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the compared tokens, ``[T, K]``, and the index of the right one, ``[T]``."""
    z_TD = torch.cat([one.z_LD for one in batch])
    right_T = torch.cat([one.tokens_L for one in batch])
    out_TE = inverter.directions([one.z_LD for one in batch])
    near_TK = torch.cat([one.candidates_LK for one in batch])
    drawn_K = torch.unique(torch.cat([right_T, torch.randint(len(inverter.linear.prior_V), (others,))]))
    drawn = inverter.scores(inverter.linear.scores(z_TD, drawn_K), out_TE, drawn_K)
    near = inverter.scores(torch.cat([one.scores_LK for one in batch]), out_TE, near_TK)
    near = near.masked_fill(torch.isin(near_TK, drawn_K), float("-inf"))
    return torch.cat([drawn, near], dim=1), torch.searchsorted(drawn_K, right_T)


def _pool(pairs: Sequence[KnownPair], vocabulary: int) -> torch.Tensor:
    """The tokens of the own rows and ``RANDOM_CANDIDATES`` random tokens, without duplicates, ``[K]``."""
    held = torch.tensor([token for pair in pairs for token in pair.tokens])
    pool_K: torch.Tensor = torch.unique(torch.cat([held, torch.randint(vocabulary, (RANDOM_CANDIDATES,))]))
    return pool_K


def split_held_out(examples: list[_Item]) -> tuple[list[_Item], list[_Item]]:
    """Training examples, and held-out examples that select the best epoch."""
    held_out = max(1, int(HELD_OUT_SHARE * len(examples)))
    return examples[:-held_out] or examples, examples[-held_out:]


def shuffled_batches(examples: list[_Item], size: int, draw: random.Random) -> Iterator[list[_Item]]:
    """All examples once in random order, in batches of ``size``."""
    order = draw.sample(examples, len(examples))
    return (order[start : start + size] for start in range(0, len(order), size))
