"""Vocabulary matching: the adversary runs bottom and finds, token by token, the input whose result crossed.

For each sequence a beam of hypotheses is kept, with bottom's KV cache and, if the boundary has noise, the public
language model's. At each position the linear inverter and the language model propose tokens. Each one is run through
bottom after each hypothesis, and scored by Bayes' rule: log-likelihood of the error plus the language model's
log-probability. If no proposal is near the crossing vector, more are tried, at last the whole vocabulary. The noise of
each token is taken as unknown (the likelihood is maximized over it), so noise that depends on a token's sensitivity is
covered.

Shapes: R sequences, H hypotheses (R × beam), C proposals, T tokens, D width of a crossing vector, E width of the model,
V vocabulary.
"""

from __future__ import annotations

import copy
import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from isthmus.attacks.knowledge import Knowledge
from isthmus.errors import AttackError

BATCH_TOKENS = 4096
"""Tokens per pass through bottom."""
SURE = 20.0
"""Nats by which a sequence's best tokens must lead for the language model to be left out."""
MEDIAN_FROM = 32
"""Positions after which the median error of the recovered tokens bounds what counts as near."""
NARROW_WIDTH = 64
"""Width of a crossing vector below which the language model is used from the start."""
CLEAN_VARIANCE = 1e-6
"""Noise variance, as a share of the crossing vectors' mean square, below which one hypothesis is enough."""
NEAR_DEVIATIONS = 8.0
"""Standard deviations of the noise's squared norm within which a proposal counts as near."""


@dataclass(frozen=True)
class MatchingSettings:
    """Settings of the search."""

    proposals: int = 64
    """Tokens that are tried at a position."""
    wider: tuple[int, ...] = (512, 4096)
    """Numbers of tokens that are tried next if none is near."""
    beam: int = 4
    """Hypotheses per sequence."""
    whole: int = 32
    """Most searches of the whole vocabulary."""
    group: int = 16
    """Sequences that are recovered at a time."""


def match_vocabulary(knowledge: Knowledge, settings: MatchingSettings = MatchingSettings()) -> list[list[int]]:
    """The recovered tokens of every sequence in the view, in the view's order.

    Raises:
        AttackError: the view has no crossings or no own rows, or not all tokens of a row cross.
    """
    rows = [crossing.hidden_LD.float() for crossing in knowledge.view.needs("crossings", "pairs").crossings]
    if any(len(pair.tokens) != pair.crossing.length for pair in knowledge.view.pairs):
        raise AttackError(
            "matching starts at the first token, but with boundary.tail not all tokens cross",
            remedy="use --attack decoder",
        )
    if rows[0].shape[1] < NARROW_WIDTH:
        return _recover_all(_Matcher(knowledge, settings, read=True), rows)[0]
    texts, leads = _recover_all(_Matcher(knowledge, settings), rows)
    unsure = [number for number, lead in enumerate(leads) if lead < SURE]
    if unsure:
        again, _ = _recover_all(_Matcher(knowledge, settings, read=True), [rows[number] for number in unsure])
        for number, tokens in zip(unsure, again, strict=True):
            texts[number] = tokens
    return texts


def _recover_all(matcher: _Matcher, rows: list[torch.Tensor]) -> tuple[list[list[int]], list[float]]:
    """The tokens of each sequence, and its smallest lead of the best token over the second best, in nats."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    texts: list[list[int]] = [[] for _ in rows]
    leads = [math.inf for _ in rows]
    for start in range(0, len(order), matcher.settings.group):
        numbers = order[start : start + matcher.settings.group]
        recovered = matcher.recover([rows[number] for number in numbers])
        for number, text, lead in zip(numbers, *recovered, strict=True):
            texts[number], leads[number] = text, lead
    return texts, leads


class _Matcher:
    """Recovers groups of sequences.

    Args:
        read: use the language model, and with noise several hypotheses.
    """

    def __init__(self, knowledge: Knowledge, settings: MatchingSettings, *, read: bool = False) -> None:
        self.settings = settings
        self._knowledge = knowledge
        self._boundary_map = knowledge.boundary_map
        power = float(torch.cat([pair.crossing.hidden_LD for pair in knowledge.view.pairs[:32]]).square().mean())
        self._floor = 0.25 * self._boundary_map.variance + 1e-12 * power
        self._model = knowledge.language_model if read else None
        self._beam = settings.beam if read and self._boundary_map.variance > CLEAN_VARIANCE * power else 1
        self._near = self._boundary_map.variance + 1e-9 * power
        self._whole_left = settings.whole
        self._best: list[float] = []
        """Smallest error of a proposal at each position so far."""

    @torch.no_grad()
    def recover(self, rows: list[torch.Tensor]) -> tuple[list[list[int]], list[float]]:
        """The tokens of these sequences, and each one's smallest lead in nats.

        Args:
            rows: the crossing vectors of each sequence, the longest first.
        """
        beam = _Beam(len(rows), self._beam, self._knowledge, self._model)
        done: list[list[int]] = []
        least = [math.inf for _ in rows]
        for position in range(len(rows[0])):
            active = sum(len(row) > position for row in rows)
            done = beam.shrink(active) + done
            leads = self._advance(beam, torch.stack([row[position] for row in rows[:active]]))
            least[:active] = map(min, least, leads)
        return beam.shrink(0) + done, least

    def _advance(self, beam: _Beam, z_RD: torch.Tensor) -> list[float]:
        """Recover one position of all active sequences; returns the lead of each one's best token, in nats."""
        z_HD = z_RD.repeat_interleave(self._beam, dim=0)
        tokens_HC = self._proposals(beam, z_RD)
        error_HC = self._errors(beam, tokens_HC, z_HD)
        for row in range(len(z_RD)):
            self._widen(beam, row, z_RD[row : row + 1], tokens_HC, error_HC)
        likelihood_HC = -0.5 * z_RD.shape[1] * (self._floor + error_HC).log()
        likelihood_HC += beam.prior_HV.gather(1, tokens_HC)
        best_R2 = likelihood_HC[:: self._beam].topk(2, dim=1).values
        beam.step(tokens_HC, likelihood_HC)
        return (best_R2[:, 0] - best_R2[:, 1]).tolist()

    def _proposals(self, beam: _Beam, z_RD: torch.Tensor) -> torch.Tensor:
        """The proposed tokens of each hypothesis, ``[H, C]``."""
        count = min(max(self.settings.proposals, 2), len(self._knowledge.linear.prior_V))
        return self._likeliest(z_RD.repeat_interleave(self._beam, dim=0), beam.prior_HV, count)

    def _likeliest(self, z_HD: torch.Tensor, prior_HV: torch.Tensor, count: int) -> torch.Tensor:
        """The likeliest tokens by the linear inverter and, if it is used, the language model, ``[H, count]``."""
        linear = self._knowledge.linear
        if self._model is None:
            return linear.best(z_HD, count)
        return (linear.scores(z_HD) - linear.prior_V + prior_HV).topk(count, dim=1).indices

    def _widen(
        self, beam: _Beam, row: int, z_1D: torch.Tensor, tokens_HC: torch.Tensor, error_HC: torch.Tensor
    ) -> None:
        """If no proposal is near, replace the proposals by the nearest of more tokens, in place."""
        bound = self._bound(z_1D.shape[1])
        own = slice(row * self._beam, (row + 1) * self._beam)
        best = own.start + int(beam.scores_H[own].argmax())
        vocabulary = len(self._knowledge.linear.prior_V)
        for count in (*(min(wider, vocabulary) for wider in self.settings.wider), vocabulary):
            if count <= tokens_HC.shape[1]:
                continue
            error = float(error_HC[own][beam.scores_H[own].isfinite()].min())
            if error <= bound or (count == vocabulary and not self._whole_left):
                break
            if count == vocabulary:
                self._whole_left -= 1
            wide_1C = self._likeliest(z_1D, beam.prior_HV[best : best + 1], count)
            wide_error_1C = self._errors(beam, wide_1C, z_1D, [best])
            nearest = wide_error_1C[0].topk(tokens_HC.shape[1], largest=False).indices
            tokens_HC[own] = wide_1C[:, nearest]
            error_HC[own] = self._errors(beam, tokens_HC[own], z_1D.expand(self._beam, -1), range(own.start, own.stop))
        self._best.append(float(error_HC[own][beam.scores_H[own].isfinite()].min()))

    def _bound(self, width: int) -> float:
        """The largest error that counts as near: by the own rows' noise or, if all errors are larger (the adversary
        lacks the silo's adapter), four times the median error so far."""
        bound = self._near * (1 + NEAR_DEVIATIONS * math.sqrt(2 / width))
        usual = statistics.median(self._best) if len(self._best) >= MEDIAN_FROM else 0.0
        return bound if usual <= bound else 4 * usual

    def _errors(self, beam: _Beam, tokens_HC: torch.Tensor, z_HD: torch.Tensor, hypotheses: Any = None) -> torch.Tensor:
        """Mean squared error of a coordinate, ``[H, C]``, if each token is the next of its hypothesis."""
        numbers = list(range(len(tokens_HC)) if hypotheses is None else hypotheses)
        parts = []
        for place, number in enumerate(numbers):
            for tokens_C in torch.split(tokens_HC[place], BATCH_TOKENS):
                parts.append((place, number, tokens_C))
        errors: list[list[torch.Tensor]] = [[] for _ in numbers]
        for batch in _batches(parts):
            results_TE = beam.bottom_after([(number, tokens_C) for _, number, tokens_C in batch])
            parts_CE = torch.split(results_TE, [len(tokens_C) for _, _, tokens_C in batch])
            for (place, _, _), h_CE in zip(batch, parts_CE, strict=True):
                errors[place].append((self._boundary_map(h_CE) - z_HD[place]).square().mean(dim=1))
        return torch.stack([torch.cat(one) for one in errors])


class _Beam:
    """Hypotheses of several sequences, with their KV caches."""

    def __init__(self, rows: int, size: int, knowledge: Knowledge, model: Any) -> None:
        self._size = size
        self._bottom = knowledge.bottom
        self._model = model
        self._caches = [DynamicCache(config=self._bottom.config)]
        if model is not None:
            self._caches.append(DynamicCache(config=model.config))
        self._ids_HT = torch.zeros(rows * size, 0, dtype=torch.long)
        self.scores_H = torch.tensor([0.0, *[-math.inf] * (size - 1)]).repeat(rows)
        self.prior_HV = knowledge.linear.prior_V.expand(rows * size, -1)
        """Log-probability of each next token."""

    def shrink(self, rows: int) -> list[list[int]]:
        """Keep the first ``rows`` sequences; returns the best hypotheses of the others."""
        kept = rows * self._size
        ended = range(kept, len(self._ids_HT), self._size)
        best = [first + int(self.scores_H[first : first + self._size].argmax()) for first in ended]
        texts = [self._ids_HT[one].tolist() for one in best]
        if texts:
            self._select(torch.arange(kept))
            self.prior_HV = self.prior_HV[:kept]
        return texts

    def bottom_after(self, proposals: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
        """Bottom's result for possible next tokens of hypotheses, concatenated, ``[T, E]``.

        Args:
            proposals: pairs of a hypothesis and tokens.
        """
        cache = _shallow(self._caches[0])
        cache.batch_select_indices(torch.tensor([number for number, tokens in proposals for _ in tokens]))
        ids_T1 = torch.cat([tokens for _, tokens in proposals]).unsqueeze(1)
        return self._bottom.hidden(input_ids=ids_T1, past_key_values=cache, use_cache=True)[:, 0]

    def step(self, tokens_HC: torch.Tensor, gain_HC: torch.Tensor) -> None:
        """Keep the best continuations of each sequence's hypotheses."""
        total_RX = (self.scores_H.unsqueeze(1) + gain_HC).view(-1, self._size * tokens_HC.shape[1])
        scores_RB, places_RB = total_RX.topk(self._size, dim=1)
        first_R1 = torch.arange(len(total_RX)).unsqueeze(1) * self._size
        parents_H = (first_R1 + places_RB // tokens_HC.shape[1]).flatten()
        tokens_H = tokens_HC.view(len(total_RX), -1).gather(1, places_RB).flatten()
        self._select(parents_H)
        self.scores_H = scores_RB.flatten()
        self._ids_HT = torch.cat([self._ids_HT, tokens_H.unsqueeze(1)], dim=1)
        self._bottom.hidden(input_ids=tokens_H.unsqueeze(1), past_key_values=self._caches[0], use_cache=True)
        if self._model is None:
            self.prior_HV = torch.zeros(1, 1).expand(len(tokens_H), self.prior_HV.shape[1])
            return
        output = self._model(input_ids=tokens_H.unsqueeze(1), past_key_values=self._caches[1], use_cache=True)
        self.prior_HV = output.logits[:, -1].float().log_softmax(dim=1)

    def _select(self, hypotheses_H: torch.Tensor) -> None:
        self._ids_HT, self.scores_H = self._ids_HT[hypotheses_H], self.scores_H[hypotheses_H]
        for cache in self._caches:
            cache.batch_select_indices(hypotheses_H)


def _batches(parts: list[tuple[int, int, torch.Tensor]]) -> list[list[tuple[int, int, torch.Tensor]]]:
    """Consecutive parts in batches with at most ``BATCH_TOKENS`` tokens each."""
    batches: list[list[tuple[int, int, torch.Tensor]]] = []
    room = 0
    for part in parts:
        if len(part[2]) > room:
            batches.append([])
            room = BATCH_TOKENS
        batches[-1].append(part)
        room -= len(part[2])
    return batches


def _shallow(cache: Any) -> Any:
    """A copy of a cache that shares tensors. Selection and appending rebind them, so the original stays unchanged."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other
