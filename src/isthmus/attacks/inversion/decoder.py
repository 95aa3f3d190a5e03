"""The decoder inverter, a learned attack: it generates the text token by token with attention to all vectors of a row.

It needs no vector per token, so it also works with ``boundary.tail`` or ``boundary.width``. The frozen public language
model reads the text generated so far. A small transformer reads the model's hidden states and, by cross-attention, the
crossing vectors, and corrects the model's scores.

If all tokens cross, the decoder also reads the vector of the next token and adds the linear inverter's scores. It then
starts as the product of language model and linear inverter (Bayes' rule). The epoch with the least held-out loss is
kept, so on those rows its loss is never above that start; its number of right tokens may still be lower.

Shapes: B rows, L vectors that crossed, W generated tokens, T vectors or tokens of all rows, K tokens, D width of a
crossing vector, E width of the public model, M width of the decoder, V vocabulary.
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

from isthmus.attacks.inversion.linear import LinearInverter
from isthmus.attacks.inversion.transformer import EMBEDDED_POSITIONS, shuffled_batches, split_held_out
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import KnownPair


@dataclass(frozen=True)
class DecoderSettings:
    """Size and training of the decoder."""

    epochs: int = 12
    rows: int = 16
    """Rows per step, and per batch of generation."""
    learning_rate: float = 1e-3
    width: int = 256
    blocks: int = 2
    heads: int = 4
    others: int = 1024
    """Random tokens per step, which the loss compares with the right ones."""
    seed: int = 0


def invert_by_decoder(knowledge: Knowledge, settings: DecoderSettings = DecoderSettings()) -> list[list[int]]:
    """A generated text for every sequence in the view, in the view's order.

    Raises:
        AttackError: the view has no crossings or no own rows.
    """
    view = knowledge.view.needs("crossings", "pairs")
    decoder = train_decoder(knowledge, settings)
    rows = [crossing.hidden_LD.float() for crossing in view.crossings]
    whole = _whole(view.pairs)
    longest = max(len(pair.tokens) for pair in view.pairs)
    texts: list[list[int]] = []
    for start in range(0, len(rows), settings.rows):
        batch = rows[start : start + settings.rows]
        texts += decoder.generate(batch, [len(row) if whole else longest for row in batch])
    return texts


class Decoder(nn.Module):
    """Scores of every next token: the language model's plus a correction from the crossing vectors.

    Args:
        model: the public language model, which stays frozen.
        z_TD: own vectors, for standardization.
        linear: the linear inverter, if all tokens cross; None: if not.
    """

    def __init__(
        self, model: Any, z_TD: torch.Tensor, settings: DecoderSettings, linear: LinearInverter | None = None
    ) -> None:
        super().__init__()
        self._model = [model]  # in a list it is no submodule: not trained, not in state_dict
        self.head_VE: torch.Tensor = model.get_output_embeddings().weight.detach().float()
        self._scale = float(self.head_VE.square().mean().sqrt())
        self.begin, self.end = _ends(model)
        self._mean_D, self._scale_D = z_TD.mean(dim=0), z_TD.std(dim=0).clamp_min(1e-6)
        layer: dict[str, Any] = {"dropout": 0.1, "activation": "gelu", "batch_first": True, "norm_first": True}
        width, heads, inner = settings.width, settings.heads, 4 * settings.width
        self._into, self._from_lm = nn.Linear(z_TD.shape[1], width), nn.Linear(self.head_VE.shape[1], width)
        self._places = nn.Embedding(EMBEDDED_POSITIONS, width)
        encoder = nn.TransformerEncoderLayer(width, heads, inner, **layer)
        self._reader = nn.TransformerEncoder(encoder, settings.blocks, enable_nested_tensor=False)
        self._writer = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(width, heads, inner, **layer), settings.blocks, norm=nn.LayerNorm(width)
        )
        self._linear = linear
        self._own = nn.Linear(z_TD.shape[1], width)
        self._out = nn.Linear(width, self.head_VE.shape[1])
        self._log_scale, self._log_linear_weight = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self._out.weight)
        nn.init.normal_(self._places.weight, std=0.5)

    @torch.no_grad()
    def read(self, ids_BW: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
        """The language model's last hidden states of these tokens, ``[B, W, E]``, which follow those in the cache."""
        backbone = self._model[0].base_model
        output = backbone(input_ids=ids_BW, past_key_values=cache, use_cache=cache is not None)
        lm_BWE: torch.Tensor = output.last_hidden_state.float()
        return lm_BWE

    def directions(self, rows: Sequence[torch.Tensor], lm_BWE: torch.Tensor) -> torch.Tensor:
        """The correction of the language model's hidden states, ``[B, W, E]``; causal in the generated tokens."""
        z_BLD = pad_sequence([(row - self._mean_D) / self._scale_D for row in rows], batch_first=True)
        absent_BL = torch.arange(z_BLD.shape[1]) >= torch.tensor([len(row) for row in rows]).unsqueeze(1)
        x_BLM = self._reader(self._into(z_BLD) + self._at(z_BLD.shape[1]), src_key_padding_mask=absent_BL)
        y_BWM = self._from_lm(nn.functional.normalize(lm_BWE, dim=-1) * 8.0) + self._at(lm_BWE.shape[1])
        if self._linear is not None:
            y_BWM = y_BWM + _fitted(self._own(z_BLD), lm_BWE.shape[1])
        later_WW = torch.ones(lm_BWE.shape[1], lm_BWE.shape[1], dtype=torch.bool).triu(1)
        y_BWM = self._writer(y_BWM, x_BLM, tgt_mask=later_WW, memory_key_padding_mask=absent_BL)
        out_BWE: torch.Tensor = self._out(y_BWM)
        return out_BWE / self._scale

    def scores(
        self,
        lm_TE: torch.Tensor,
        out_TE: torch.Tensor,
        tokens_K: torch.Tensor | None = None,
        own_TD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores of all tokens, ``[T, V]``, or of ``tokens_K``, ``[T, K]``.

        Args:
            lm_TE: the language model's hidden states.
            out_TE: result of ``directions``.
            own_TD: the crossing vector of the next token; NaN after the end of a row.
        """
        head_KE = self.head_VE if tokens_K is None else self.head_VE[tokens_K]
        scores_TK = (lm_TE * self._log_scale.exp() + out_TE) @ head_KE.T
        if self._linear is None or own_TD is None:
            return scores_TK
        prior_K = self._linear.prior_V if tokens_K is None else self._linear.prior_V[tokens_K]
        linear_TK = self._linear.scores(own_TD, tokens_K) - prior_K
        return scores_TK + self._log_linear_weight.exp() * torch.where(own_TD[:, :1].isnan(), 0.0, linear_TK)

    def own(self, rows: Sequence[torch.Tensor], width: int) -> torch.Tensor:
        """The crossing vector of the token at each position, ``[B, width, D]``; NaN after the end of a row."""
        own_BLD = pad_sequence(list(rows), batch_first=True, padding_value=float("nan"))
        return _fitted(own_BLD, width, float("nan"))

    @torch.no_grad()
    def generate(self, rows: Sequence[torch.Tensor], longest: list[int]) -> list[list[int]]:
        """The greedy text of each row, until the end-of-text token, at most ``longest`` tokens per row."""
        ids_BW = torch.full((len(rows), 1), self.begin)
        own_BWD = self.own(rows, max(longest))
        cache = DynamicCache(config=self._model[0].config)
        states: list[torch.Tensor] = []
        for place in range(max(longest)):
            states.append(self.read(ids_BW[:, -1:], cache))
            out_BE = self.directions(rows, torch.cat(states, dim=1))[:, -1]
            best_B = self.scores(states[-1][:, 0], out_BE, own_TD=own_BWD[:, place]).argmax(dim=1)
            ids_BW = torch.cat([ids_BW, best_B.unsqueeze(1)], dim=1)
        texts = [ids_W[1 : 1 + length].tolist() for ids_W, length in zip(ids_BW, longest, strict=True)]
        if self._linear is not None:
            return texts  # their lengths are known
        return [text[: text.index(self.end)] if self.end in text else text for text in texts]

    def _at(self, length: int) -> torch.Tensor:
        places_LM: torch.Tensor = self._places(torch.arange(length).clamp_max(EMBEDDED_POSITIONS - 1))
        return places_LM


@dataclass(frozen=True, eq=False)
class DecoderExample:
    """An own row: its crossing vectors, the language model's hidden states, and the next token at each position."""

    z_LD: torch.Tensor
    lm_WE: torch.Tensor
    next_W: torch.Tensor


def train_decoder(knowledge: Knowledge, settings: DecoderSettings) -> Decoder:
    """A decoder trained on the view's own rows; the epoch with the least loss on held-out rows is kept."""
    pairs = knowledge.view.pairs
    z_TD = torch.cat([pair.crossing.hidden_LD.float() for pair in pairs])
    state = torch.get_rng_state()
    torch.manual_seed(settings.seed)
    try:
        linear = knowledge.linear if _whole(pairs) else None
        decoder = Decoder(knowledge.language_model, z_TD, settings, linear)
        learned, held_out = split_held_out(_examples(decoder, pairs, settings.rows))
        return _learned(decoder, learned, held_out, settings)
    finally:
        torch.set_rng_state(state)


def _examples(decoder: Decoder, pairs: Sequence[KnownPair], size: int) -> list[DecoderExample]:
    """The training examples. The language model reads each text once, however many crossings the text has."""
    states: dict[tuple[int, ...], torch.Tensor] = {}
    texts = sorted({pair.tokens for pair in pairs}, key=len)
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        ids = [torch.tensor([decoder.begin, *text]) for text in part]
        lm_BWE = decoder.read(pad_sequence(ids, batch_first=True))
        states |= {text: lm_WE[: len(text) + 1].clone() for text, lm_WE in zip(part, lm_BWE, strict=True)}
    return [
        DecoderExample(pair.crossing.hidden_LD.float(), states[pair.tokens], torch.tensor([*pair.tokens, decoder.end]))
        for pair in pairs
    ]


def _learned(
    decoder: Decoder, learned: list[DecoderExample], held_out: list[DecoderExample], settings: DecoderSettings
) -> Decoder:
    steps = max(settings.epochs, 1) * -(-len(learned) // settings.rows)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps, pct_start=0.1)
    least, kept = _held_out_loss(decoder, held_out, settings), copy.deepcopy(decoder.state_dict())
    draw = random.Random(settings.seed)
    for _ in range(settings.epochs):
        decoder.train()
        for batch in shuffled_batches(learned, settings.rows, draw):
            optimizer.zero_grad()
            _loss(decoder, batch, settings.others).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        loss = _held_out_loss(decoder, held_out, settings)
        if loss < least:
            least, kept = loss, copy.deepcopy(decoder.state_dict())
    decoder.load_state_dict(kept)
    return decoder.eval()


def _loss(decoder: Decoder, batch: Sequence[DecoderExample], others: int) -> torch.Tensor:
    """Cross-entropy of the right tokens among the batch's right tokens and random tokens."""
    lm_BWE = pad_sequence([one.lm_WE for one in batch], batch_first=True)
    rows = [one.z_LD for one in batch]
    out_BWE, own_BWD = decoder.directions(rows, lm_BWE), decoder.own(rows, lm_BWE.shape[1])
    real_BW = torch.arange(lm_BWE.shape[1]) < torch.tensor([len(one.next_W) for one in batch]).unsqueeze(1)
    right_T = torch.cat([one.next_W for one in batch])
    drawn_K = torch.unique(torch.cat([right_T, torch.randint(len(decoder.head_VE), (others,))]))
    scores_TK = decoder.scores(lm_BWE[real_BW], out_BWE[real_BW], drawn_K, own_BWD[real_BW])
    return cross_entropy(scores_TK, torch.searchsorted(drawn_K, right_T))


@torch.no_grad()
def _held_out_loss(decoder: Decoder, held_out: Sequence[DecoderExample], settings: DecoderSettings) -> float:
    decoder.eval()
    parts = [held_out[start : start + settings.rows] for start in range(0, len(held_out), settings.rows)]
    losses = [float(_loss(decoder, part, settings.others)) * sum(len(one.next_W) for one in part) for part in parts]
    return sum(losses) / sum(len(one.next_W) for one in held_out)


def _whole(pairs: Sequence[KnownPair]) -> bool:
    """Whether all tokens of each row cross."""
    return all(len(pair.tokens) == pair.crossing.length for pair in pairs)


def _fitted(x_BLD: torch.Tensor, width: int, value: float = 0.0) -> torch.Tensor:
    """The tensor cut or padded with ``value`` to ``width`` positions."""
    return nn.functional.pad(x_BLD, (0, 0, 0, width - x_BLD.shape[1]), value=value)


def _ends(model: Any) -> tuple[int, int]:
    """The tokens before and after a text: beginning-of-text (or end-of-text if there is none), end-of-text."""
    end = model.config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    end = 0 if end is None else end
    begin = model.config.bos_token_id
    return (end if begin is None else begin), end
