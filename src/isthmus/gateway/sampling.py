"""How an answer's next token is chosen: by whom it is asked, and by nobody who shares the pass.

Shapes: V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

COLDEST = 1e-4
"""Temperatures below are taken for 0: logits divided by them have no end."""


@dataclass(frozen=True)
class SamplingSettings:
    """What a request says of the choice of tokens."""

    temperature: float = 1.0
    """Below ``COLDEST``: the likeliest token."""
    top_p: float = 1.0
    """The smallest set of tokens with this probability is drawn from; 1: all."""
    seed: int | None = None
    """None: a new one each time."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer has."""
    frequency_penalty: float = 0.0
    """Likewise, for each time that the answer has it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to these tokens' logits."""


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of an answer with the model's log-probabilities, in nats, before settings change them."""

    token: int
    log_prob: float = 0.0
    best: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at its place."""


class TokenRule(Protocol):
    """What an answer is held to while it is written."""

    @property
    def complete(self) -> bool:
        """Whether the answer is whole, and nothing can follow."""
        ...

    def allowed(self, size: int) -> torch.Tensor:
        """Which tokens may come next, ``[V]``, bool; at least one.

        Args:
            size: V, of the model's logits.
        """
        ...

    def take(self, token: int) -> None:
        """The token that was chosen."""
        ...


class TokenChooser:
    """Chooses the tokens of one answer.

    Args:
        rule: what the answer is held to; None: nothing. Tokens that it does not allow are left out after penalties
            and biases, before temperature and top_p.
        processors: what the model's own generation settings make of logits.
        answer: number of the answer among those to one prompt. The first draws as ``torch.manual_seed(seed)`` makes
            ``generate`` draw, the others from seeds of their own.
        likeliest: number of likeliest tokens to note at each place; None: no log-probabilities.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        processors: LogitsProcessorList | None = None,
        *,
        answer: int = 0,
        likeliest: int | None = None,
        rule: TokenRule | None = None,
    ) -> None:
        self._settings, self._processors, self._likeliest = settings, processors or LogitsProcessorList(), likeliest
        self._rule = rule
        self._warpers = LogitsProcessorList()
        if settings.temperature != 1.0 and settings.temperature >= COLDEST:
            self._warpers.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(settings.top_p))
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(_seed_of(settings.seed, answer))

    @property
    def complete(self) -> bool:
        """Whether the answer is whole by its rule, and nothing can follow."""
        return self._rule is not None and self._rule.complete

    def take(self, token: int) -> None:
        """The answer goes on with this token: one that was chosen, and does not end it."""
        if self._rule is not None:
            self._rule.take(token)

    def choose(self, prompt: Sequence[int], given: Sequence[int], logits_V: torch.Tensor) -> ScoredToken:
        """The next token.

        Args:
            given: the answer so far.
            logits_V: the model's.
        """
        logits_V = logits_V.float().cpu()
        token = self._token(prompt, given, logits_V)
        if self._likeliest is None:
            return ScoredToken(token)
        log_probs_V = logits_V.log_softmax(dim=-1)
        values, tokens = log_probs_V.topk(min(self._likeliest, len(log_probs_V)))
        best = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        return ScoredToken(token, float(log_probs_V[token]), best)

    def _token(self, prompt: Sequence[int], given: Sequence[int], logits_V: torch.Tensor) -> int:
        scores_1V = self._penalized(given, logits_V)[None]
        before_1L = torch.tensor([[*prompt, *given]]) if self._processors or self._warpers else torch.empty(1, 0)
        scores_1V = self._ruled(self._processors(before_1L, scores_1V), scores_1V)
        if self._settings.temperature < COLDEST:
            return int(scores_1V[0].argmax())
        scores_1V = self._warpers(before_1L, scores_1V)
        return int(torch.multinomial(scores_1V.softmax(dim=-1), 1, generator=self._generator))

    def _ruled(self, scores_1V: torch.Tensor, own_1V: torch.Tensor) -> torch.Tensor:
        """The scores of allowed tokens, of others minus infinity. Where the model's settings leave none, ``own_1V``."""
        if self._rule is None:
            return scores_1V
        banned_V = ~self._rule.allowed(scores_1V.shape[1])
        ruled_1V = scores_1V.masked_fill(banned_V, -torch.inf)
        return ruled_1V if bool((ruled_1V > -torch.inf).any()) else own_1V.masked_fill(banned_V, -torch.inf)

    def _penalized(self, given: Sequence[int], logits_V: torch.Tensor) -> torch.Tensor:
        """The logits with penalties and biases, by OpenAI's formula."""
        settings, changes = self._settings, Counter[int]()
        if settings.presence_penalty or settings.frequency_penalty:
            for token, count in Counter(given).items():
                changes[token] -= settings.presence_penalty + count * settings.frequency_penalty  # type: ignore[assignment]
        for token, bias in settings.logit_bias.items():
            changes[token] += bias  # type: ignore[assignment]
        if changes:
            logits_V = logits_V.clone()
            logits_V[list(changes)] += torch.tensor(list(changes.values()), dtype=logits_V.dtype)
        return logits_V


def _seed_of(seed: int, answer: int) -> int:
    if not answer:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{answer}".encode(), digest_size=7).digest(), "big")
