"""Vocabulary matching: the adversary runs bottom itself and finds, token after token, what gives what it saw.

For every sequence a few hypotheses (a beam) of what was said so far are kept, with bottom's KV cache and, where noise
leaves a doubt, the public language model's. At each position the linear inverter and the language model together
propose tokens; each is run through bottom behind each hypothesis and judged by Bayes' rule: log-likelihood of the
difference to what arrived plus log-probability by the language model. If no proposal comes near what arrived, more are
tried, and at last the whole vocabulary. How large the noise is at a token is taken to be unknown (the likelihood is
maximized over it), so a boundary that noises some tokens more than others is met as it is.

Shapes: R sequences, H hypotheses (R × beam), C proposals, D width of what crosses, V vocabulary.
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

RUN = 4096
"""Tokens run through bottom at a time."""
SURE = 20.0
"""Nats between the best token and the next above which the language model need not be asked."""
ENOUGH = 32
"""Positions after which the sequences themselves say what is near."""
NARROW = 64
"""Numbers a token below which the linear inverter alone is no guide, so that the language model is asked at once."""
CLEAN = 1e-6
"""Share of the power of what crosses; with less noise than that one hypothesis is enough."""
SPREAD = 8.0
"""Standard deviations of the noise's squared length within which a proposal is near."""


@dataclass(frozen=True)
class Search:
    """How hard to look."""

    proposals: int = 64
    """Tokens tried at a position."""
    wider: tuple[int, ...] = (512, 4096)
    """Tried, one after the other, where none of those is near."""
    beam: int = 4
    whole: int = 32
    """Searches through the whole vocabulary, at most."""
    group: int = 16
    """Sequences at a time."""


def match(knowledge: Knowledge, search: Search = Search()) -> list[list[int]]:
    """The tokens of every sequence in the view, in its order.

    Raises:
        AttackError: only the ends of sequences cross: there is nothing to start from.
    """
    rows = [crossing.hidden_LD.float() for crossing in knowledge.view.needs("crossings", "pairs").crossings]
    if any(len(pair.tokens) != pair.crossing.length for pair in knowledge.view.pairs):
        raise AttackError(
            "matching goes from the first token on, but not all tokens cross", remedy="use --attack decoder"
        )
    if rows[0].shape[1] < NARROW:
        return _search(_Matcher(knowledge, search, read=True), rows)[0]
    found, gaps = _search(_Matcher(knowledge, search), rows)
    unsure = [number for number, gap in enumerate(gaps) if gap < SURE]
    if unsure:
        again, _ = _search(_Matcher(knowledge, search, read=True), [rows[number] for number in unsure])
        for number, tokens in zip(unsure, again, strict=True):
            found[number] = tokens
    return found


def _search(matcher: _Matcher, rows: list[torch.Tensor]) -> tuple[list[list[int]], list[float]]:
    """Tokens of each sequence, and by how many nats its closest decision was made."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    found: list[list[int]] = [[] for _ in rows]
    gaps = [math.inf for _ in rows]
    for start in range(0, len(order), matcher.search.group):
        numbers = order[start : start + matcher.search.group]
        texts, least = matcher.recover([rows[number] for number in numbers])
        for number, text, gap in zip(numbers, texts, least, strict=True):
            found[number], gaps[number] = text, gap
    return found, gaps


class _Matcher:
    """
    Args:
        read: have the language model read along, and keep several hypotheses.
    """

    def __init__(self, knowledge: Knowledge, search: Search, *, read: bool = False) -> None:
        self.search = search
        self._knowledge = knowledge
        self._tail = knowledge.tail
        power = float(torch.cat([pair.crossing.hidden_LD for pair in knowledge.view.pairs[:32]]).square().mean())
        self._floor = 0.25 * self._tail.variance + 1e-12 * power
        self._model = knowledge.language_model if read else None
        self._beam = search.beam if read and self._tail.variance > CLEAN * power else 1
        self._near = self._tail.variance + 1e-9 * power
        self._whole = search.whole
        self._best: list[float] = []
        """Error of the best proposal, position by position."""

    @torch.no_grad()
    def recover(self, rows: list[torch.Tensor]) -> tuple[list[list[int]], list[float]]:
        """Tokens of these sequences, which must come longest first, and how sure each is, in nats."""
        beam = _Beam(len(rows), self._beam, self._knowledge, self._model)
        done: list[list[int]] = []
        least = [math.inf for _ in rows]
        for position in range(len(rows[0])):
            active = sum(len(row) > position for row in rows)
            done = beam.shrink(active) + done
            gaps = self._advance(beam, torch.stack([row[position] for row in rows[:active]]))
            least[:active] = map(min, least, gaps)
        return beam.shrink(0) + done, least

    def _advance(self, beam: _Beam, z_RD: torch.Tensor) -> list[float]:
        """One position of all active sequences; gives by how much each one's best token beats its second."""
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
        """The likeliest tokens by the linear inverter and what was said before, ``[H, C]``."""
        count = min(max(self.search.proposals, 2), len(self._knowledge.linear.prior_V))
        return self._likeliest(z_RD.repeat_interleave(self._beam, dim=0), beam.prior_HV, count)

    def _likeliest(self, z_HD: torch.Tensor, prior_HV: torch.Tensor, count: int) -> torch.Tensor:
        """By the linear inverter and, if it reads along, the language model: ``[H, count]``."""
        linear = self._knowledge.linear
        if self._model is None:
            return linear.best(z_HD, count)
        return (linear.scores(z_HD) - linear.prior_V + prior_HV).topk(count, dim=1).indices

    def _widen(
        self, beam: _Beam, row: int, z_1D: torch.Tensor, tokens_HC: torch.Tensor, error_HC: torch.Tensor
    ) -> None:
        """Where no proposal is near, put the nearest of many in their place."""
        bound = self._bound(z_1D.shape[1])
        own = slice(row * self._beam, (row + 1) * self._beam)
        best = own.start + int(beam.scores_H[own].argmax())
        vocabulary = len(self._knowledge.linear.prior_V)
        for count in (*(min(wider, vocabulary) for wider in self.search.wider), vocabulary):
            if count <= tokens_HC.shape[1]:
                continue
            error = float(error_HC[own][beam.scores_H[own].isfinite()].min())
            if error <= bound or (count == vocabulary and not self._whole):
                break
            self._whole -= count == vocabulary
            wide_1C = self._likeliest(z_1D, beam.prior_HV[best : best + 1], count)
            wide_error_1C = self._errors(beam, wide_1C, z_1D, [best])
            nearest = wide_error_1C[0].topk(tokens_HC.shape[1], largest=False).indices
            tokens_HC[own] = wide_1C[:, nearest]
            error_HC[own] = self._errors(beam, tokens_HC[own], z_1D.expand(self._beam, -1), range(own.start, own.stop))
        self._best.append(float(error_HC[own][beam.scores_H[own].isfinite()].min()))

    def _bound(self, width: int) -> float:
        """The largest error that is near: by what the adversary's own rows say or, where they mislead (it lacks the
        silo's adapter), by what the sequences so far came to."""
        bound = self._near * (1 + SPREAD * math.sqrt(2 / width))
        usual = statistics.median(self._best) if len(self._best) >= ENOUGH else 0.0
        return bound if usual <= bound else 4 * usual

    def _errors(self, beam: _Beam, tokens_HC: torch.Tensor, z_HD: torch.Tensor, hypotheses: Any = None) -> torch.Tensor:
        """Mean squared difference of a coordinate, ``[H, C]``, were each token the next of its hypothesis."""
        numbers = list(range(len(tokens_HC)) if hypotheses is None else hypotheses)
        parts = []
        for place, number in enumerate(numbers):
            for tokens_C in torch.split(tokens_HC[place], RUN):
                parts.append((place, number, tokens_C))
        errors: list[list[torch.Tensor]] = [[] for _ in numbers]
        for batch in _batches(parts):
            found = beam.bottom_after([(number, tokens_C) for _, number, tokens_C in batch])
            found_C = torch.split(found, [len(tokens_C) for _, _, tokens_C in batch])
            for (place, _, _), h_CE in zip(batch, found_C, strict=True):
                errors[place].append((self._tail(h_CE) - z_HD[place]).square().mean(dim=1))
        return torch.stack([torch.cat(one) for one in errors])


class _Beam:
    """Hypotheses of several sequences, with caches."""

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
        """Keep the first sequences only; gives the best hypotheses of the others."""
        kept = rows * self._size
        ended = range(kept, len(self._ids_HT), self._size)
        best = [first + int(self.scores_H[first : first + self._size].argmax()) for first in ended]
        given = [self._ids_HT[one].tolist() for one in best]
        if given:
            self._select(torch.arange(kept))
            self.prior_HV = self.prior_HV[:kept]
        return given

    def bottom_after(self, asked: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
        """Bottom's result for tokens that would come next in a hypothesis, all one after another, ``[T, E]``."""
        cache = _shallow(self._caches[0])
        cache.batch_select_indices(torch.tensor([number for number, tokens in asked for _ in tokens]))
        ids_T1 = torch.cat([tokens for _, tokens in asked]).unsqueeze(1)
        return self._bottom.hidden(input_ids=ids_T1, past_key_values=cache, use_cache=True)[:, 0]

    def step(self, tokens_HC: torch.Tensor, gain_HC: torch.Tensor) -> None:
        """Keep of each sequence the best continuations of its hypotheses."""
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
    """Runs of parts with at most ``RUN`` tokens each."""
    batches: list[list[tuple[int, int, torch.Tensor]]] = []
    room = 0
    for part in parts:
        if len(part[2]) > room:
            batches.append([])
            room = RUN
        batches[-1].append(part)
        room -= len(part[2])
    return batches


def _shallow(cache: Any) -> Any:
    """A cache that may be selected from and appended to without touching the first: layers rebind tensors."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other
