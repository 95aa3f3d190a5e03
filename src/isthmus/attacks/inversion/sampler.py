"""Bayesian inversion: which texts, with what probability, given what crossed; for boundaries that let only ends cross.

The adversary starts from texts that it has (a *pool*: its own rows and public ones, put into the recipe's template)
and weighs them by how likely each makes what arrived (``channel``). If many weigh about the same, the channel said no
more than that, and they are the answer. If few do, some of them are annealed, each by itself: the noise is first taken
to be so large that many weigh something, and lowered step by step to what it is, while a token at a time is replaced,
added, dropped or swapped with the next where the public language model and the slope of the likelihood propose it (the
slope as in gradient-guided coordinate search, Zou et al. 2023; a token's prior is the language model's by what stands
before it, so moves are Gibbs steps up to what stands behind). No text grows longer than the longest of the pool.

The answer is not the likeliest text but the one of which most tokens are expected to be right: at each place, counted
from the end that agrees more, the token with the most weight. Where nothing is told this is the best guess by the
pool; where all is told it is the text.

Shapes: N texts, L tokens, K last positions that crossed, D width of what crosses, E width of the model, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from isthmus.attacks.inversion.channel import Channel
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.template import Template, Text
from isthmus.errors import AttackError

TOLD = 0.05
"""Weight of texts so long below which the answer is no longer."""


@dataclass(frozen=True)
class Sampling:
    """How hard to look."""

    particles: int = 4
    """Texts annealed for each row."""
    steps: int = 12
    """Of each; half of them lower the noise."""
    proposals: int = 24
    """Moves weighed at a step of a text."""
    enough: float = 8.0
    """Texts of the pool that weigh something (1 / Σ w²), from which on they are the answer."""
    seed: int = 0


@dataclass(frozen=True)
class Weighted:
    """A text, and its share of belief."""

    text: Text
    weight: float


def sample(knowledge: Knowledge, sampling: Sampling = Sampling()) -> list[list[int]]:
    """The tokens of every sequence in the view, in its order.

    Raises:
        AttackError: all tokens cross: ``matching`` goes from one to the next, which is stronger.
    """
    view = knowledge.view.needs("crossings", "pairs")
    if all(len(pair.tokens) == pair.crossing.length for pair in view.pairs):
        raise AttackError(
            "the search is for boundaries that let only ends of rows cross, but all tokens do",
            remedy="use --attack matching",
        )
    channel, template = Channel(knowledge), knowledge.template
    pool = list(dict.fromkeys(template.text_of(pair.tokens) for pair in view.pairs))
    sampler = _Sampler(knowledge, channel, sampling)
    pools: dict[int, tuple[list[Text], torch.Tensor]] = {}
    found = []
    for crossing in view.crossings:
        count = crossing.length
        if count not in pools:
            fitting = [text for text in pool if len(template.filled(text)) >= count]
            pools[count] = fitting, channel.expected([template.filled(text) for text in fitting], count)
        texts, mean_NKD = pools[count]
        z_KD = crossing.hidden_LD.float()
        belief = sampler.believed(texts, channel.log_likelihood(mean_NKD, z_KD), z_KD)
        found.append(list(template.filled(answered(belief, from_end=bool(template.after)))))
    return found


def answered(belief: Sequence[Weighted], *, from_end: bool = False) -> Text:
    """At each place the token with the most weight; places are counted from the end at which more weight agrees.

    Args:
        from_end: the template tells where texts end, so count from there.
    """
    right, agreed = _voted([Weighted(one.text[::-1], one.weight) for one in belief])
    if from_end:
        return right[::-1]
    left, agrees = _voted(belief)
    return left if agrees >= agreed else right[::-1]


def _voted(belief: Sequence[Weighted]) -> tuple[Text, float]:
    voted: list[int] = []
    agreed = 0.0
    for place in range(max(len(one.text) for one in belief)):
        votes: Counter[int] = Counter()
        for one in belief:
            if place < len(one.text):
                votes[one.text[place]] += one.weight  # type: ignore[assignment]
        if votes.total() < TOLD:
            break
        token, weight = votes.most_common(1)[0]
        voted.append(token)
        agreed += weight
    return tuple(voted), agreed


class _Sampler:
    """Draws texts of one row after another."""

    def __init__(self, knowledge: Knowledge, channel: Channel, sampling: Sampling) -> None:
        self._channel, self._sampling = channel, sampling
        self._mover = _Mover(knowledge, channel, sampling)
        self._template: Template = knowledge.template

    def believed(self, pool: Sequence[Text], likelihood_N: torch.Tensor, z_KD: torch.Tensor) -> list[Weighted]:
        """What to believe of a row; weights sum to 1."""
        weight_N = likelihood_N.softmax(dim=0)
        effective = _effective(weight_N)
        told = [Weighted(text, float(weight)) for text, weight in zip(pool, weight_N, strict=True)]
        if effective >= self._sampling.enough:
            return told
        drawn, likelihood_M = self._drawn(list(pool), likelihood_N, z_KD)
        both = torch.cat([likelihood_N.max().unsqueeze(0), likelihood_M])
        trust = effective * float(_settled(both, z_KD.numel())[0].exp())  # none, if texts were found that fit better
        share = trust / (trust + len(drawn))
        weight_M = _settled(likelihood_M, z_KD.numel()).softmax(dim=0) * (1 - share)
        moved = [Weighted(text, float(weight)) for text, weight in zip(drawn, weight_M, strict=True)]
        return [*(Weighted(one.text, one.weight * share) for one in told), *moved]

    def _drawn(
        self, texts: list[Text], likelihood_N: torch.Tensor, z_KD: torch.Tensor
    ) -> tuple[list[Text], torch.Tensor]:
        """Texts that moved until the noise had come down to what it is, and their log-likelihoods."""
        size, draw, steps = self._sampling.particles, random.Random(self._sampling.seed), self._sampling.steps
        first = _heat(likelihood_N, min(4 * size, len(texts)) / 2)
        longest = max(map(len, texts))
        best = texts[int(likelihood_N.argmax())]
        texts = [texts[number] for number in _resampled((likelihood_N * first).softmax(dim=0), size - 1, draw)]
        texts = [best, *texts]
        for step in range(steps):
            heat = first ** max(0.0, 1 - 2 * step / steps)
            texts = self._mover.moved(texts, z_KD, heat, draw, longest)
        texts = list(dict.fromkeys([best, *texts]))
        mean_NKD = self._channel.expected([self._template.filled(text) for text in texts], len(z_KD))
        return texts, self._channel.log_likelihood(mean_NKD, z_KD)


class _Mover:
    """Changes one token of a text at a time."""

    def __init__(self, knowledge: Knowledge, channel: Channel, sampling: Sampling) -> None:
        self._knowledge, self._channel, self._sampling = knowledge, channel, sampling
        self._template: Template = knowledge.template

    def moved(
        self, texts: Sequence[Text], z_KD: torch.Tensor, heat: float, draw: random.Random, longest: int
    ) -> list[Text]:
        """Of each text, itself or a neighbour, drawn among those proposed: by the prior and this share of the
        log-likelihood."""
        choices = [self._choices(text, z_KD, heat, draw, longest) for text in texts]
        tried = [self._template.filled(one) for part in choices for one, _ in part]
        likelihood_N = self._channel.log_likelihood(self._channel.expected(tried, len(z_KD)), z_KD)
        found = []
        for part, likelihood in zip(choices, torch.split(likelihood_N, list(map(len, choices))), strict=True):
            score = heat * likelihood + torch.tensor([gain for _, gain in part])
            (number,) = _resampled(score.softmax(dim=0), 1, draw)
            found.append(part[number][0])
        return found

    def _choices(
        self, text: Text, z_KD: torch.Tensor, heat: float, draw: random.Random, longest: int
    ) -> list[tuple[Text, float]]:
        """The text itself, and neighbours as long as texts may be."""
        choices = [(text, 0.0), *self._neighbours(text, self._prior(text), z_KD, heat, draw)]
        shortest = len(z_KD) - len(self._template.filled(()))
        return [(one, gain) for one, gain in choices if shortest <= len(one) <= longest]

    @torch.no_grad()
    def _prior(self, text: Text) -> torch.Tensor:
        """Log-probability of each token at each place given what stands before it, ``[L + 1, V]``."""
        model, before = self._knowledge.language_model, self._template.before
        begin = model.config.bos_token_id
        first = before or ((model.config.eos_token_id if begin is None else begin) or 0,)
        ids_1L = torch.tensor([[*first, *text]])
        logits_LV: torch.Tensor = model(input_ids=ids_1L).logits[0, len(first) - 1 :].float()
        return logits_LV.log_softmax(dim=1)

    def _neighbours(
        self, text: Text, prior_LV: torch.Tensor, z_KD: torch.Tensor, heat: float, draw: random.Random
    ) -> list[tuple[Text, float]]:
        """Texts one token away, each with its gain of log-probability by the language model.

        Longer and shorter texts are compared at the text's mean of a token, for the pool's lengths are the prior of
        lengths, not the language model's.
        """
        count = self._sampling.proposals
        said = [float(prior_LV[place, token]) for place, token in enumerate(text)]
        mean = sum(said) / len(said) if said else float(prior_LV.max())
        found = []
        for place, token in self._replacements(text, prior_LV, z_KD, heat, count - 3 * (count // 8), draw):
            gain = float(prior_LV[place, token]) - said[place]
            found.append(((*text[:place], token, *text[place + 1 :]), gain))
        for _ in range(count // 8):
            place = draw.randrange(len(text) + 1)
            (token,) = _resampled(prior_LV[place].softmax(dim=0), 1, draw)
            found.append(((*text[:place], token, *text[place:]), float(prior_LV[place, token]) - mean))
            if len(text) > 1 and place < len(text):
                found.append(((*text[:place], *text[place + 1 :]), mean - said[place]))
            if place + 1 < len(text):
                found.append(((*text[:place], text[place + 1], text[place], *text[place + 2 :]), 0.0))
        return found

    def _replacements(
        self, text: Text, prior_LV: torch.Tensor, z_KD: torch.Tensor, heat: float, count: int, draw: random.Random
    ) -> list[tuple[int, int]]:
        """Places and tokens: those that language model and slope together find best, and some by each one alone."""
        if not text:
            return []
        first = len(self._template.before)
        slope_LE = self._channel.slope(self._template.filled(text), z_KD)[first : first + len(text)]
        embedding_VE, now_L = self._knowledge.embedding, torch.tensor(text)
        gain_LV = heat * (slope_LE @ embedding_VE.T - (slope_LE * embedding_VE[now_L]).sum(dim=1, keepdim=True))
        gain_LV = gain_LV / gain_LV.abs().amax().clamp_min(10.0) * 10.0  # far from here the slope tells no size
        prior_LV = prior_LV[: len(text)]
        found = dict.fromkeys(_best(gain_LV + prior_LV, count // 3) + _best(gain_LV, count // 3))
        for _ in range(count - 2 * (count // 3)):
            place = draw.randrange(len(text))
            (token,) = _resampled(prior_LV[place].softmax(dim=0), 1, draw)
            found[place, token] = None
        return [(place, token) for place, token in found if text[place] != token]


def _best(score_LV: torch.Tensor, count: int) -> list[tuple[int, int]]:
    """Places and tokens of the highest scores."""
    width = score_LV.shape[1]
    return [divmod(number, width) for number in score_LV.flatten().topk(min(count, score_LV.numel())).indices.tolist()]


def _effective(weight_N: torch.Tensor) -> float:
    """As how many texts of one weight these are."""
    return float(1.0 / weight_N.double().square().sum())


def _heat(likelihood_N: torch.Tensor, wanted: float) -> float:
    """The largest share of the log-likelihood by which still so many texts weigh something."""
    low, high = -40.0, 0.0  # its logarithm
    for _ in range(40):
        middle = (low + high) / 2
        many = _effective((likelihood_N * math.exp(middle)).softmax(dim=0)) >= wanted
        low, high = (middle, high) if many else (low, middle)
    return math.exp(low)


def _settled(likelihood_N: torch.Tensor, numbers: int) -> torch.Tensor:
    """Log-weight of texts that have moved: less where one is further from what arrived than noise on so many numbers
    makes likely (half of them on average, in nats), for it has not come to rest."""
    slack = 0.5 * numbers + 3 * math.sqrt(0.5 * numbers)
    return (likelihood_N - likelihood_N.max() + slack).clamp_max(0.0)


def _resampled(weight_N: torch.Tensor, count: int, draw: random.Random) -> list[int]:
    """Numbers drawn by weight."""
    sums_N = weight_N.double().cumsum(dim=0)
    spots = torch.tensor([draw.random() for _ in range(count)], dtype=torch.double) * sums_N[-1]
    return torch.searchsorted(sums_N, spots).clamp_max(len(weight_N) - 1).tolist()
