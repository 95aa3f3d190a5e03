"""Which of these texts was it? The adversary is given candidates and says, row by row, which made what arrived.

The strongest side information there is short of the text itself: so this measures what the channel tells, whatever it
takes to find a text from nothing. The likelihood is exact (``channel``), and with equal chances for all candidates
beforehand no guess does better.

Shapes: N candidates, K last positions that crossed, D width of what crosses.
"""

from __future__ import annotations

import torch

from isthmus.attacks.found import Ranks
from isthmus.attacks.inversion.channel import Channel
from isthmus.attacks.knowledge import Knowledge

RANKED = 10


def identify(knowledge: Knowledge) -> Ranks:
    """The likeliest candidates of every sequence, the best first.

    Raises:
        AttackError: the adversary was given no candidates, or sees nothing that crossed.
    """
    view = knowledge.view.needs("crossings", "pairs", "asked")
    channel = Channel(knowledge)
    texts = [(*row.prompt, *row.answer[:-1]) for row in view.asked]
    whole = all(len(pair.tokens) == pair.crossing.length for pair in view.pairs)
    expected: dict[int, tuple[list[int], torch.Tensor]] = {}
    ranked = []
    for crossing in view.crossings:
        count = crossing.length
        if count not in expected:
            numbers = [number for number, text in enumerate(texts) if _fits(len(text), count, whole)]
            expected[count] = numbers, channel.expected([texts[number] for number in numbers], count)
        numbers, mean_NKD = expected[count]
        likelihood_N = channel.log_likelihood(mean_NKD, crossing.hidden_LD.float())
        best = likelihood_N.topk(min(RANKED, len(numbers))).indices.tolist()
        ranked.append([numbers[one] for one in best])
    return Ranks(ranked)


def _fits(length: int, count: int, whole: bool) -> bool:
    """Whether a text of this length can have crossed: where all tokens do, what crosses tells the length."""
    return length == count if whole else length >= count
