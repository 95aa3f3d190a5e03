"""A learned decoder: writes the text token after token while it looks at all that crossed of a row.

It needs no vector a token, so it also meets a boundary that lets only the last positions of a row pass, or narrower
vectors. The frozen public language model reads what was written so far; a small transformer sees its hidden states
and, by cross-attention, what crossed, and says what to add to the language model's scores.

Where all tokens cross, the writer is also given the very vector of the token to be written, and the linear inverter's
scores are added: it starts as language model times inverter, by Bayes' rule, and the best epoch on held-out rows is
kept, so on those rows its loss is never more than that one's; what it then recovers may still be less.

Shapes: B rows, L vectors that crossed, W tokens written, T of all rows one after another, D width of what crosses,
E width of the public model, M width of the decoder, V vocabulary.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from isthmus.attacks.inversion.inverters import parted, shuffled
from isthmus.attacks.inversion.linear import LinearInverter
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import Pair

PLACES = 2048


@dataclass(frozen=True)
class Writing:
    """How long to learn, and how to write."""

    epochs: int = 12
    rows: int = 16
    """A step."""
    learning_rate: float = 1e-3
    width: int = 256
    blocks: int = 2
    heads: int = 4
    others: int = 1024
    """Tokens drawn at random that are told apart from the right ones."""
    seed: int = 0


def write(knowledge: Knowledge, writing: Writing = Writing()) -> list[list[int]]:
    """The text of every sequence in the view, in its order, as tokens."""
    view = knowledge.view.needs("crossings", "pairs")
    decoder = train_decoder(knowledge, writing)
    rows = [crossing.hidden_LD.float() for crossing in view.crossings]
    whole = _whole(view.pairs)
    longest = max(len(pair.tokens) for pair in view.pairs)
    written: list[list[int]] = []
    for start in range(0, len(rows), writing.rows):
        batch = rows[start : start + writing.rows]
        written += decoder.written(batch, [len(row) if whole else longest for row in batch])
    return written


class Decoder(nn.Module):
    """Scores of every next token: the language model's, and a direction in its head's space from what crossed.

    Args:
        z_TD: of the adversary's own rows, to know their scale.
        linear: all tokens cross, and this tells of each vector which token it is.
    """

    def __init__(self, model: Any, z_TD: torch.Tensor, writing: Writing, linear: LinearInverter | None = None) -> None:
        super().__init__()
        self._model = [model]  # a list hides it from ``parameters`` and ``state_dict``: it stays as it is
        self.head_VE: torch.Tensor = model.get_output_embeddings().weight.detach().float()
        self._scale = float(self.head_VE.square().mean().sqrt())
        self.begin, self.end = _ends(model)
        self._mean_D, self._scale_D = z_TD.mean(dim=0), z_TD.std(dim=0).clamp_min(1e-6)
        settings: dict[str, Any] = {"dropout": 0.1, "activation": "gelu", "batch_first": True, "norm_first": True}
        width, heads, inner = writing.width, writing.heads, 4 * writing.width
        self._into, self._said = nn.Linear(z_TD.shape[1], width), nn.Linear(self.head_VE.shape[1], width)
        self._places = nn.Embedding(PLACES, width)
        encoder = nn.TransformerEncoderLayer(width, heads, inner, **settings)
        self._reader = nn.TransformerEncoder(encoder, writing.blocks, enable_nested_tensor=False)
        self._writer = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(width, heads, inner, **settings), writing.blocks, norm=nn.LayerNorm(width)
        )
        self._linear = linear
        self._own = nn.Linear(z_TD.shape[1], width)
        self._out = nn.Linear(width, self.head_VE.shape[1])
        self._warmth, self._trust = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self._out.weight)
        nn.init.normal_(self._places.weight, std=0.5)

    @torch.no_grad()
    def read(self, ids_BW: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
        """The language model's last hidden states of these tokens, ``[B, W, E]``; they follow those in the cache."""
        backbone = self._model[0].base_model
        output = backbone(input_ids=ids_BW, past_key_values=cache, use_cache=cache is not None)
        said_BWE: torch.Tensor = output.last_hidden_state.float()
        return said_BWE

    def directions(self, rows: Sequence[torch.Tensor], said_BWE: torch.Tensor) -> torch.Tensor:
        """``[B, W, E]``: added to ``said_BWE`` before the head; causal in what was said."""
        z_BLD = pad_sequence([(row - self._mean_D) / self._scale_D for row in rows], batch_first=True)
        absent_BL = torch.arange(z_BLD.shape[1]) >= torch.tensor([len(row) for row in rows]).unsqueeze(1)
        x_BLM = self._reader(self._into(z_BLD) + self._at(z_BLD.shape[1]), src_key_padding_mask=absent_BL)
        y_BWM = self._said(nn.functional.normalize(said_BWE, dim=-1) * 8.0) + self._at(said_BWE.shape[1])
        if self._linear is not None:
            y_BWM = y_BWM + _fitted(self._own(z_BLD), said_BWE.shape[1])
        later_WW = torch.ones(said_BWE.shape[1], said_BWE.shape[1], dtype=torch.bool).triu(1)
        y_BWM = self._writer(y_BWM, x_BLM, tgt_mask=later_WW, memory_key_padding_mask=absent_BL)
        out_BWE: torch.Tensor = self._out(y_BWM)
        return out_BWE / self._scale

    def scores(
        self,
        said_TE: torch.Tensor,
        out_TE: torch.Tensor,
        tokens_K: torch.Tensor | None = None,
        own_TD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Of all tokens, ``[T, V]``, or of these, ``[T, K]``.

        Args:
            own_TD: what crossed of the token that is to be written; not a number behind the end.
        """
        head_KE = self.head_VE if tokens_K is None else self.head_VE[tokens_K]
        scores_TK = (said_TE * self._warmth.exp() + out_TE) @ head_KE.T
        if self._linear is None or own_TD is None:
            return scores_TK
        prior_K = self._linear.prior_V if tokens_K is None else self._linear.prior_V[tokens_K]
        told_TK = self._linear.scores(own_TD, tokens_K) - prior_K
        return scores_TK + self._trust.exp() * torch.where(own_TD[:, :1].isnan(), 0.0, told_TK)

    def own(self, rows: Sequence[torch.Tensor], width: int) -> torch.Tensor:
        """What crossed of the token to be written at each place, ``[B, width, D]``; not a number behind the end."""
        own_BLD = pad_sequence(list(rows), batch_first=True, padding_value=float("nan"))
        return _fitted(own_BLD, width, float("nan"))

    @torch.no_grad()
    def written(self, rows: Sequence[torch.Tensor], longest: list[int]) -> list[list[int]]:
        """Greedily, for each row until the end of its text or so many tokens."""
        ids_BW = torch.full((len(rows), 1), self.begin)
        own_BWD = self.own(rows, max(longest))
        cache = DynamicCache(config=self._model[0].config)
        said: list[torch.Tensor] = []
        for place in range(max(longest)):
            said.append(self.read(ids_BW[:, -1:], cache))
            out_BE = self.directions(rows, torch.cat(said, dim=1))[:, -1]
            best_B = self.scores(said[-1][:, 0], out_BE, own_TD=own_BWD[:, place]).argmax(dim=1)
            ids_BW = torch.cat([ids_BW, best_B.unsqueeze(1)], dim=1)
        texts = [ids_W[1 : 1 + length].tolist() for ids_W, length in zip(ids_BW, longest, strict=True)]
        if self._linear is not None:
            return texts  # their lengths are known
        return [text[: text.index(self.end)] if self.end in text else text for text in texts]

    def _at(self, length: int) -> torch.Tensor:
        places_LM: torch.Tensor = self._places(torch.arange(length).clamp_max(PLACES - 1))
        return places_LM


@dataclass(frozen=True, eq=False)
class Dictation:
    """A row of the adversary's own: what crossed, what the language model thinks at each place, what comes there."""

    z_LD: torch.Tensor
    said_WE: torch.Tensor
    next_W: torch.Tensor


def train_decoder(knowledge: Knowledge, writing: Writing) -> Decoder:
    """Learn from the view's pairs; the epoch with the least loss on held-out rows is kept."""
    pairs = knowledge.view.pairs
    z_TD = torch.cat([pair.crossing.hidden_LD.float() for pair in pairs])
    state = torch.get_rng_state()
    torch.manual_seed(writing.seed)
    try:
        linear = knowledge.linear if _whole(pairs) else None
        decoder = Decoder(knowledge.language_model, z_TD, writing, linear)
        learned, held_out = parted(_dictations(decoder, pairs, writing.rows))
        return _learned(decoder, learned, held_out, writing)
    finally:
        torch.set_rng_state(state)


def _dictations(decoder: Decoder, pairs: Sequence[Pair], size: int) -> list[Dictation]:
    """The language model reads each text once; the same text with other noise shares what it made of it."""
    said: dict[tuple[int, ...], torch.Tensor] = {}
    texts = sorted({pair.tokens for pair in pairs}, key=len)
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        ids = [torch.tensor([decoder.begin, *text]) for text in part]
        said_BWE = decoder.read(pad_sequence(ids, batch_first=True))
        said |= {text: said_WE[: len(text) + 1].clone() for text, said_WE in zip(part, said_BWE, strict=True)}
    return [
        Dictation(pair.crossing.hidden_LD.float(), said[pair.tokens], torch.tensor([*pair.tokens, decoder.end]))
        for pair in pairs
    ]


def _learned(decoder: Decoder, learned: list[Dictation], held_out: list[Dictation], writing: Writing) -> Decoder:
    steps = max(writing.epochs, 1) * -(-len(learned) // writing.rows)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=writing.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, writing.learning_rate, total_steps=steps, pct_start=0.1)
    least, kept = _held_out_loss(decoder, held_out, writing), copy.deepcopy(decoder.state_dict())
    draw = random.Random(writing.seed)
    for _ in range(writing.epochs):
        decoder.train()
        for batch in shuffled(learned, writing.rows, draw):
            optimizer.zero_grad()
            _loss(decoder, batch, writing.others).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        loss = _held_out_loss(decoder, held_out, writing)
        if loss < least:
            least, kept = loss, copy.deepcopy(decoder.state_dict())
    decoder.load_state_dict(kept)
    return decoder.eval()


def _loss(decoder: Decoder, batch: Sequence[Dictation], others: int) -> torch.Tensor:
    """Cross-entropy of the right tokens among one another and others drawn at random."""
    said_BWE = pad_sequence([one.said_WE for one in batch], batch_first=True)
    rows = [one.z_LD for one in batch]
    out_BWE, own_BWD = decoder.directions(rows, said_BWE), decoder.own(rows, said_BWE.shape[1])
    real_BW = torch.arange(said_BWE.shape[1]) < torch.tensor([len(one.next_W) for one in batch]).unsqueeze(1)
    right_T = torch.cat([one.next_W for one in batch])
    drawn_K = torch.unique(torch.cat([right_T, torch.randint(len(decoder.head_VE), (others,))]))
    scores_TK = decoder.scores(said_BWE[real_BW], out_BWE[real_BW], drawn_K, own_BWD[real_BW])
    return cross_entropy(scores_TK, torch.searchsorted(drawn_K, right_T))


@torch.no_grad()
def _held_out_loss(decoder: Decoder, held_out: Sequence[Dictation], writing: Writing) -> float:
    decoder.eval()
    parts = [held_out[start : start + writing.rows] for start in range(0, len(held_out), writing.rows)]
    losses = [float(_loss(decoder, part, writing.others)) * sum(len(one.next_W) for one in part) for part in parts]
    return sum(losses) / sum(len(one.next_W) for one in held_out)


def _whole(pairs: Sequence[Pair]) -> bool:
    """Whether all tokens cross."""
    return all(len(pair.tokens) == pair.crossing.length for pair in pairs)


def _fitted(x_BLD: torch.Tensor, width: int, value: float = 0.0) -> torch.Tensor:
    """As many places as are wanted: cut, or filled up."""
    return nn.functional.pad(x_BLD, (0, 0, 0, width - x_BLD.shape[1]), value=value)


def _ends(model: Any) -> tuple[int, int]:
    """The tokens that stand before and after a text."""
    end = model.config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    end = 0 if end is None else end
    begin = model.config.bos_token_id
    return (end if begin is None else begin), end
