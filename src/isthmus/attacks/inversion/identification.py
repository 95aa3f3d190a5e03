"""Identification: which of given candidates is behind each crossing.

The adversary has the strongest side information short of the text itself, so the result measures what the boundary
reveals, independent of how hard it is to find a text from nothing. The likelihood is exact (``likelihood``), so for
equally likely candidates no attack does better.

Shapes: N candidates, K last positions that crossed, D width of a crossing vector.
"""

from __future__ import annotations

import torch

from isthmus.attacks.inversion.likelihood import BoundaryLikelihood
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.recovered import CandidateRanks

RANKED = 10
"""Candidates that are ranked for each sequence."""


def identify_rows(knowledge: Knowledge) -> CandidateRanks:
    """The likeliest candidates for every sequence, the likeliest first.

    Raises:
        AttackError: the view has no candidates, no crossings, or no own rows.
    """
    view = knowledge.view.needs("crossings", "pairs", "candidates")
    likelihood = BoundaryLikelihood(knowledge)
    texts = [(*row.prompt, *row.answer[:-1], *row.filler) for row in view.candidates]
    whole = all(len(pair.tokens) == pair.crossing.length for pair in view.pairs)
    expected: dict[int, tuple[list[int], torch.Tensor]] = {}
    ranked = []
    for crossing in view.crossings:
        count = crossing.length
        if count not in expected:
            numbers = [number for number, text in enumerate(texts) if _fits(len(text), count, whole)]
            expected[count] = numbers, likelihood.expected([texts[number] for number in numbers], count)
        numbers, mean_NKD = expected[count]
        likelihood_N = likelihood.log_likelihood(mean_NKD, crossing.hidden_LD.float())
        best = likelihood_N.topk(min(RANKED, len(numbers))).indices.tolist()
        ranked.append([numbers[one] for one in best])
    return CandidateRanks(ranked)


def _fits(length: int, count: int, whole: bool) -> bool:
    """Whether a text of ``length`` tokens can have ``count`` crossing vectors.

    Args:
        whole: all tokens of a row cross.
    """
    return length == count if whole else length >= count
