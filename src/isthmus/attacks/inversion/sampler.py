"""Bayesian inversion: a posterior over texts given what crossed, for boundaries with ``boundary.tail``.

The adversary starts from a *pool* of texts (its own rows and public ones, in the recipe's template) and weights them by
likelihood (``likelihood``). If many texts have about the same weight, the boundary reveals no more, and they are the
posterior. Otherwise some texts are annealed, each on its own. The noise is first taken as so large that many texts have
weight, and lowered stepwise to its real value. At each step one token is replaced, inserted, deleted or swapped with
the next, as the public language model and the likelihood's gradient propose (as in greedy coordinate gradient search,
Zou et al. 2023). A token's prior is the language model's given the preceding tokens, so moves are Gibbs steps up to the
following tokens. No text grows longer than the longest of the pool.

The result is not the likeliest text but the one with the most expected right tokens: at each position, counted from the
end with more agreement, the token with the most weight. If the boundary reveals nothing, this is the best guess from
the pool; if it reveals everything, it is the text.

Shapes: N texts, L tokens, K last positions that crossed, D width of a crossing vector, E width of the model, V
vocabulary.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from isthmus.attacks.inversion.likelihood import BoundaryLikelihood
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.template import Template, Text
from isthmus.errors import AttackError

LEAST_VOTES = 0.05
"""Total weight of texts with a token at a position, below which the result ends there."""


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of the search."""

    particles: int = 4
    """Texts annealed for each row."""
    steps: int = 12
    """Moves of each annealed text; the first half lowers the noise."""
    proposals: int = 24
    """Moves that are compared at a step."""
    enough: float = 8.0
    """Effective number of texts of the pool (1 / Σ w²) from which on no text is annealed."""
    seed: int = 0


@dataclass(frozen=True)
class WeightedText:
    """A text and its posterior weight."""

    text: Text
    weight: float


def invert_by_sampling(knowledge: Knowledge, settings: SamplerSettings = SamplerSettings()) -> list[list[int]]:
    """The recovered tokens of every sequence in the view, in the view's order.

    Raises:
        AttackError: the view has no crossings or no own rows, or all tokens cross (then ``matching`` is stronger).
    """
    view = knowledge.view.needs("crossings", "pairs")
    if all(len(pair.tokens) == pair.crossing.length for pair in view.pairs):
        raise AttackError(
            "the attack search is for recipes with boundary.tail, but all tokens cross",
            remedy="use --attack matching",
        )
    likelihood, template = BoundaryLikelihood(knowledge), knowledge.template
    pool = list(dict.fromkeys(template.text_of(pair.tokens) for pair in view.pairs))
    sampler = _Sampler(knowledge, likelihood, settings)
    pools: dict[int, tuple[list[Text], torch.Tensor]] = {}
    recovered = []
    for crossing in view.crossings:
        count = crossing.length
        if count not in pools:
            fitting = [text for text in pool if len(template.filled(text)) >= count]
            pools[count] = fitting, likelihood.expected([template.filled(text) for text in fitting], count)
        texts, mean_NKD = pools[count]
        z_KD = crossing.hidden_LD.float()
        belief = sampler.posterior(texts, likelihood.log_likelihood(mean_NKD, z_KD), z_KD)
        recovered.append(list(template.filled(consensus(belief, from_end=bool(template.after)))))
    return recovered


def consensus(belief: Sequence[WeightedText], *, from_end: bool = False) -> Text:
    """The text with the token of most weight at each position.

    Positions are counted from the end of the texts with more agreement.

    Args:
        from_end: count positions from the last token, because the template fixes where texts end.
    """
    right, right_agreement = _vote([WeightedText(one.text[::-1], one.weight) for one in belief])
    if from_end:
        return right[::-1]
    left, left_agreement = _vote(belief)
    return left if left_agreement >= right_agreement else right[::-1]


def _vote(belief: Sequence[WeightedText]) -> tuple[Text, float]:
    """The token with the most weight at each position from the beginning, and the sum of these weights."""
    voted: list[int] = []
    agreement = 0.0
    for place in range(max(len(one.text) for one in belief)):
        votes: Counter[int] = Counter()
        for one in belief:
            if place < len(one.text):
                votes[one.text[place]] += one.weight  # type: ignore[assignment]
        if votes.total() < LEAST_VOTES:
            break
        token, weight = votes.most_common(1)[0]
        voted.append(token)
        agreement += weight
    return tuple(voted), agreement


class _Sampler:
    """Computes posteriors over texts, row by row."""

    def __init__(self, knowledge: Knowledge, likelihood: BoundaryLikelihood, settings: SamplerSettings) -> None:
        self._likelihood, self._settings = likelihood, settings
        self._mover = _Mover(knowledge, likelihood, settings)
        self._template: Template = knowledge.template

    def posterior(self, pool: Sequence[Text], likelihood_N: torch.Tensor, z_KD: torch.Tensor) -> list[WeightedText]:
        """The posterior over texts of one row; weights sum to 1.

        Args:
            likelihood_N: log-likelihoods of the pool's texts, in nats.
        """
        weight_N = likelihood_N.softmax(dim=0)
        effective = _effective(weight_N)
        weighted = [WeightedText(text, float(weight)) for text, weight in zip(pool, weight_N, strict=True)]
        if effective >= self._settings.enough:
            return weighted
        drawn, likelihood_M = self._anneal(list(pool), likelihood_N, z_KD)
        both = torch.cat([likelihood_N.max().unsqueeze(0), likelihood_M])
        trust = effective * float(_plausible(both, z_KD.numel())[0].exp())  # near 0 if annealed texts fit better
        share = trust / (trust + len(drawn))
        weight_M = _plausible(likelihood_M, z_KD.numel()).softmax(dim=0) * (1 - share)
        moved = [WeightedText(text, float(weight)) for text, weight in zip(drawn, weight_M, strict=True)]
        return [*(WeightedText(one.text, one.weight * share) for one in weighted), *moved]

    def _anneal(
        self, texts: list[Text], likelihood_N: torch.Tensor, z_KD: torch.Tensor
    ) -> tuple[list[Text], torch.Tensor]:
        """Annealed texts and their log-likelihoods, in nats."""
        size, draw, steps = self._settings.particles, random.Random(self._settings.seed), self._settings.steps
        first = _annealing_power(likelihood_N, min(4 * size, len(texts)) / 2)
        longest = max(map(len, texts))
        best = texts[int(likelihood_N.argmax())]
        texts = [texts[number] for number in _resampled((likelihood_N * first).softmax(dim=0), size - 1, draw)]
        texts = [best, *texts]
        for step in range(steps):
            power = first ** max(0.0, 1 - 2 * step / steps)
            texts = self._mover.moved(texts, z_KD, power, draw, longest)
        texts = list(dict.fromkeys([best, *texts]))
        mean_NKD = self._likelihood.expected([self._template.filled(text) for text in texts], len(z_KD))
        return texts, self._likelihood.log_likelihood(mean_NKD, z_KD)


class _Mover:
    """Proposes and draws moves that change one token of a text."""

    def __init__(self, knowledge: Knowledge, likelihood: BoundaryLikelihood, settings: SamplerSettings) -> None:
        self._knowledge, self._likelihood, self._settings = knowledge, likelihood, settings
        self._template: Template = knowledge.template

    def moved(
        self, texts: Sequence[Text], z_KD: torch.Tensor, power: float, draw: random.Random, longest: int
    ) -> list[Text]:
        """Each text after one move, drawn among itself and its proposed neighbours by the prior and the likelihood to
        the power ``power``.

        Args:
            longest: most tokens of a text.
        """
        choices = [self._choices(text, z_KD, power, draw, longest) for text in texts]
        tried = [self._template.filled(one) for part in choices for one, _ in part]
        likelihood_N = self._likelihood.log_likelihood(self._likelihood.expected(tried, len(z_KD)), z_KD)
        moved = []
        for part, likelihood in zip(choices, torch.split(likelihood_N, list(map(len, choices))), strict=True):
            score = power * likelihood + torch.tensor([gain for _, gain in part])
            (number,) = _resampled(score.softmax(dim=0), 1, draw)
            moved.append(part[number][0])
        return moved

    def _choices(
        self, text: Text, z_KD: torch.Tensor, power: float, draw: random.Random, longest: int
    ) -> list[tuple[Text, float]]:
        """The text and its neighbours of permitted length, each with its gain of log-prior."""
        choices = [(text, 0.0), *self._neighbours(text, self._prior(text), z_KD, power, draw)]
        shortest = len(z_KD) - len(self._template.filled(()))
        return [(one, gain) for one, gain in choices if shortest <= len(one) <= longest]

    @torch.no_grad()
    def _prior(self, text: Text) -> torch.Tensor:
        """Log-probability of each token at each position given the preceding tokens, ``[L + 1, V]``."""
        model, before = self._knowledge.language_model, self._template.before
        begin = model.config.bos_token_id
        first = before or ((model.config.eos_token_id if begin is None else begin) or 0,)
        ids_1L = torch.tensor([[*first, *text]])
        logits_LV: torch.Tensor = model(input_ids=ids_1L).logits[0, len(first) - 1 :].float()
        return logits_LV.log_softmax(dim=1)

    def _neighbours(
        self, text: Text, prior_LV: torch.Tensor, z_KD: torch.Tensor, power: float, draw: random.Random
    ) -> list[tuple[Text, float]]:
        """Texts that differ in one token, each with its gain of log-probability by the language model.

        For insertions and deletions the text's mean log-probability of a token is subtracted or added, because the
        prior of lengths is the pool's, not the language model's.
        """
        count = self._settings.proposals
        own = [float(prior_LV[place, token]) for place, token in enumerate(text)]
        mean = sum(own) / len(own) if own else float(prior_LV.max())
        proposed = []
        for place, token in self._replacements(text, prior_LV, z_KD, power, count - 3 * (count // 8), draw):
            gain = float(prior_LV[place, token]) - own[place]
            proposed.append(((*text[:place], token, *text[place + 1 :]), gain))
        for _ in range(count // 8):
            place = draw.randrange(len(text) + 1)
            (token,) = _resampled(prior_LV[place].softmax(dim=0), 1, draw)
            proposed.append(((*text[:place], token, *text[place:]), float(prior_LV[place, token]) - mean))
            if len(text) > 1 and place < len(text):
                proposed.append(((*text[:place], *text[place + 1 :]), mean - own[place]))
            if place + 1 < len(text):
                proposed.append(((*text[:place], text[place + 1], text[place], *text[place + 2 :]), 0.0))
        return proposed

    def _replacements(
        self, text: Text, prior_LV: torch.Tensor, z_KD: torch.Tensor, power: float, count: int, draw: random.Random
    ) -> list[tuple[int, int]]:
        """Positions and replacement tokens: the best by language model and gradient together, and by each alone."""
        if not text:
            return []
        first = len(self._template.before)
        slope_LE = self._likelihood.slope(self._template.filled(text), z_KD)[first : first + len(text)]
        embedding_VE, now_L = self._knowledge.embedding, torch.tensor(text)
        gain_LV = power * (slope_LE @ embedding_VE.T - (slope_LE * embedding_VE[now_L]).sum(dim=1, keepdim=True))
        # The first-order gain is valid only nearby, so its size is limited.
        gain_LV = gain_LV / gain_LV.abs().amax().clamp_min(10.0) * 10.0
        prior_LV = prior_LV[: len(text)]
        proposed = dict.fromkeys(_best(gain_LV + prior_LV, count // 3) + _best(gain_LV, count // 3))
        for _ in range(count - 2 * (count // 3)):
            place = draw.randrange(len(text))
            (token,) = _resampled(prior_LV[place].softmax(dim=0), 1, draw)
            proposed[place, token] = None
        return [(place, token) for place, token in proposed if text[place] != token]


def _best(score_LV: torch.Tensor, count: int) -> list[tuple[int, int]]:
    """Positions and tokens of the highest scores."""
    width = score_LV.shape[1]
    return [divmod(number, width) for number in score_LV.flatten().topk(min(count, score_LV.numel())).indices.tolist()]


def _effective(weight_N: torch.Tensor) -> float:
    """Effective number of texts, 1 / Σ w²."""
    return float(1.0 / weight_N.double().square().sum())


def _annealing_power(likelihood_N: torch.Tensor, wanted: float) -> float:
    """The largest power of the likelihood at which the effective number of texts is at least ``wanted``."""
    low, high = -40.0, 0.0  # log of the power
    for _ in range(40):
        middle = (low + high) / 2
        many = _effective((likelihood_N * math.exp(middle)).softmax(dim=0)) >= wanted
        low, high = (middle, high) if many else (low, middle)
    return math.exp(low)


def _plausible(likelihood_N: torch.Tensor, numbers: int) -> torch.Tensor:
    """Log-weights of annealed texts: 0, but lower for a text with a larger error than noise on this many coordinates
    makes plausible (half as many nats on average), because its annealing has not converged."""
    slack = 0.5 * numbers + 3 * math.sqrt(0.5 * numbers)
    return (likelihood_N - likelihood_N.max() + slack).clamp_max(0.0)


def _resampled(weight_N: torch.Tensor, count: int, draw: random.Random) -> list[int]:
    """Indices drawn in proportion to the weights, with replacement."""
    sums_N = weight_N.double().cumsum(dim=0)
    spots = torch.tensor([draw.random() for _ in range(count)], dtype=torch.double) * sums_N[-1]
    return torch.searchsorted(sums_N, spots).clamp_max(len(weight_N) - 1).tolist()
