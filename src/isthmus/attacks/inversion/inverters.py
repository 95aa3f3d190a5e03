"""A learned transformer inverter: reads all that crossed of a row, and says which token stands at each vector.

It starts as the linear inverter and learns what to add to its scores, so it never does worse on the rows it is chosen
by. It is trained on the adversary's own rows as the same boundary let them pass, so it knows the defence by example.

Shapes: B rows, L vectors of the longest, T vectors of all rows, D width of what crosses, E width of the embedding,
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

from isthmus.attacks.inversion.linear import LinearInverter
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import Pair

Item = TypeVar("Item")
HELD_OUT = 0.08
"""Share of the adversary's rows that choose the best epoch."""
CHUNK = 256
POOL = 4096


@dataclass(frozen=True)
class Training:
    """How long to learn."""

    epochs: int = 8
    rows: int = 16
    """A step."""
    learning_rate: float = 1e-3
    width: int = 256
    blocks: int = 2
    heads: int = 4
    candidates: int = 24
    """Of the linear inverter, that are told apart at each vector."""
    others: int = 512
    """Tokens drawn at random that are told apart from them."""
    seed: int = 0


def invert(knowledge: Knowledge, training: Training = Training()) -> list[list[int]]:
    """The tokens at every vector of every sequence in the view, in its order."""
    crossings = knowledge.view.needs("crossings", "pairs").crossings
    inverter = train_inverter(knowledge, training)
    return [inverter.tokens(crossing.hidden_LD.float()) for crossing in crossings]


class Inverter(nn.Module):
    """Scores of every token: the linear inverter's, plus what a bidirectional transformer makes of the whole row."""

    def __init__(
        self, linear: LinearInverter, z_TD: torch.Tensor, embedding_VE: torch.Tensor, training: Training
    ) -> None:
        super().__init__()
        self.linear = linear
        self._embedding_VE = embedding_VE / embedding_VE.square().mean().sqrt()
        self._mean_D, self._scale_D = z_TD.mean(dim=0), z_TD.std(dim=0).clamp_min(1e-6)
        self._into = nn.Linear(z_TD.shape[1], training.width)
        self._places = nn.Embedding(2048, training.width)
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
        self._warmth = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self._out.weight)
        nn.init.zeros_(self._out.bias)
        nn.init.normal_(self._places.weight, std=0.02)

    def directions(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """What is added to the scores, as a direction in the embedding's space, ``[T, E]``."""
        z_BLD = pad_sequence([(row - self._mean_D) / self._scale_D for row in rows], batch_first=True)
        real_BL = torch.arange(z_BLD.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
        places_L = torch.arange(z_BLD.shape[1]).clamp_max(2047)
        x_BLM = self._blocks(self._into(z_BLD) + self._places(places_L), src_key_padding_mask=~real_BL)
        out_TE: torch.Tensor = self._out(self._norm(x_BLM[real_BL]))
        return out_TE

    def scores(self, linear_TK: torch.Tensor, out_TE: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Scores of ``tokens``, ``[K]`` for all vectors or ``[T, K]``, given the linear inverter's."""
        chosen = self._embedding_VE[tokens]
        added = out_TE @ chosen.T if tokens.ndim == 1 else torch.einsum("te,tke->tk", out_TE, chosen)
        return linear_TK * self._warmth.exp() + added

    @torch.no_grad()
    def tokens(self, z_LD: torch.Tensor) -> list[int]:
        """The best of the whole vocabulary at each vector."""
        everything = torch.arange(len(self._embedding_VE))
        found: list[int] = []
        for z_TD, out_TE in zip(*(torch.split(one, CHUNK) for one in (z_LD, self.directions([z_LD]))), strict=True):
            found += self.scores(self.linear.scores(z_TD), out_TE, everything).argmax(dim=1).tolist()
        return found


@dataclass(frozen=True, eq=False)
class Lesson:
    """A row of the adversary's own, with the linear inverter's candidates."""

    z_LD: torch.Tensor
    tokens_L: torch.Tensor
    candidates_LK: torch.Tensor
    scores_LK: torch.Tensor

    @classmethod
    def of(cls, pair: Pair, linear: LinearInverter, pool_K: torch.Tensor, count: int) -> Lesson:
        """With candidates out of a pool of tokens."""
        z_LD = pair.crossing.hidden_LD.float()
        best = linear.scores(z_LD, pool_K).topk(min(count, len(pool_K)), dim=1)
        return cls(z_LD, torch.tensor(pair.tokens[-len(z_LD) :]), pool_K[best.indices], best.values)


def train_inverter(knowledge: Knowledge, training: Training) -> Inverter:
    """Learn from the view's pairs; the epoch that recovers most of held-out rows is kept."""
    linear, pairs = knowledge.linear, knowledge.view.pairs
    torch_state = torch.get_rng_state()
    torch.manual_seed(training.seed)
    try:
        pool_K = _pool(pairs, len(linear.prior_V))
        learned, held_out = parted([Lesson.of(pair, linear, pool_K, training.candidates) for pair in pairs])
        inverter = Inverter(linear, torch.cat([one.z_LD for one in learned]), knowledge.embedding, training)
        return _learned(inverter, learned, held_out, training)
    finally:
        torch.set_rng_state(torch_state)


def _learned(inverter: Inverter, learned: list[Lesson], held_out: list[Lesson], training: Training) -> Inverter:
    steps = max(training.epochs, 1) * -(-len(learned) // training.rows)
    optimizer = torch.optim.AdamW(inverter.parameters(), lr=training.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, total_steps=steps, pct_start=0.1)
    best, kept = _recovered(inverter, held_out, training), copy.deepcopy(inverter.state_dict())
    draw = random.Random(training.seed)
    for _ in range(training.epochs):
        inverter.train()
        for batch in shuffled(learned, training.rows, draw):
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


def _loss(inverter: Inverter, batch: Sequence[Lesson], others: int) -> torch.Tensor:
    """Cross-entropy of the right token among the linear inverter's candidates and tokens drawn at random."""
    return cross_entropy(*_contest(inverter, batch, others))


@torch.no_grad()
def _recovered(inverter: Inverter, rows: list[Lesson], training: Training) -> float:
    """Share of right tokens among as many others."""
    inverter.eval()
    hits = 0.0
    for start in range(0, len(rows), training.rows):
        scores_TK, right_T = _contest(inverter, rows[start : start + training.rows], training.others)
        hits += float((scores_TK.argmax(dim=1) == right_T).sum())
    return hits / sum(len(one.z_LD) for one in rows)


def _contest(inverter: Inverter, batch: Sequence[Lesson], others: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the tokens to tell apart, ``[T, K]``, and which of them is right."""
    z_TD = torch.cat([one.z_LD for one in batch])
    right_T = torch.cat([one.tokens_L for one in batch])
    out_TE = inverter.directions([one.z_LD for one in batch])
    near_TK = torch.cat([one.candidates_LK for one in batch])
    drawn_K = torch.unique(torch.cat([right_T, torch.randint(len(inverter.linear.prior_V), (others,))]))
    drawn = inverter.scores(inverter.linear.scores(z_TD, drawn_K), out_TE, drawn_K)
    near = inverter.scores(torch.cat([one.scores_LK for one in batch]), out_TE, near_TK)
    near = near.masked_fill(torch.isin(near_TK, drawn_K), float("-inf"))
    return torch.cat([drawn, near], dim=1), torch.searchsorted(drawn_K, right_T)


def _pool(pairs: Sequence[Pair], vocabulary: int) -> torch.Tensor:
    """The tokens that the adversary's rows hold, and as many as ``POOL`` others."""
    held = torch.tensor([token for pair in pairs for token in pair.tokens])
    pool_K: torch.Tensor = torch.unique(torch.cat([held, torch.randint(vocabulary, (POOL,))]))
    return pool_K


def parted(lessons: list[Item]) -> tuple[list[Item], list[Item]]:
    """Those to learn from, and those that choose the best epoch."""
    held_out = max(1, int(HELD_OUT * len(lessons)))
    return lessons[:-held_out] or lessons, lessons[-held_out:]


def shuffled(lessons: list[Item], size: int, draw: random.Random) -> Iterator[list[Item]]:
    """All of them once, in batches."""
    order = draw.sample(lessons, len(lessons))
    return (order[start : start + size] for start in range(0, len(order), size))
