"""What the boundary would let arrive of a text that the adversary has in mind, and how well that fits what arrived.

The adversary runs bottom itself and knows or has measured what follows it (``knowledge.Tail``), so that the likelihood
of any text is a Gaussian's: no attack is learned. It needs no vector a token; of each text it looks at just as many
last positions as crossed.

Shapes: N texts, L tokens of the longest, K last positions that crossed, D width of what crosses, E width of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.template import Text

TOKENS = {"cpu": 2048, "cuda": 32768}
"""Run through bottom at a time."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""By which a token's noise may differ from the usual, where the recipe has some tokens noised more than others."""
EXACT = 1e-9
"""Share of the power of what crosses that the variance is at least: arithmetic is not exact."""


class Channel:
    """What arrives of a text.

    Raises:
        AttackError: the adversary has no rows of its own to measure the noise on.
    """

    def __init__(self, knowledge: Knowledge) -> None:
        pairs = knowledge.view.needs("pairs").pairs
        self._knowledge, self._tail = knowledge, knowledge.tail
        power = float(torch.cat([pair.crossing.hidden_LD.float() for pair in pairs[:64]]).square().mean())
        self.variance = self._tail.mean + EXACT * power
        """Of a coordinate, around what is expected."""
        self._factors = FACTORS if knowledge.view.recipe.sensitivity is not None else (1.0,)

    @torch.no_grad()
    def expected(self, texts: Sequence[Text], count: int) -> torch.Tensor:
        """``[N, K, D]``, without noise, at the last ``count`` positions of each text; none may be shorter."""
        found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        for numbers in _batches(texts, TOKENS[self._knowledge.embedding.device.type]):
            ids_NL = pad_sequence([torch.tensor(texts[number]) for number in numbers], batch_first=True)
            h_NLE = self._knowledge.bottom.hidden(input_ids=ids_NL, use_cache=False)
            for number, h_LE in zip(numbers, h_NLE, strict=True):
                length = len(texts[number])
                found[number] = self._tail(h_LE[length - count : length])
        return torch.stack(found)

    def log_likelihood(self, mean_NKD: torch.Tensor, z_KD: torch.Tensor) -> torch.Tensor:
        """Of what arrived, ``[N]``, in nats, up to a constant; how much each position was noised is summed over."""
        error_NK = (mean_NKD - z_KD).square().sum(dim=2)
        width, parts = z_KD.shape[1], []
        for factor in self._factors:
            variance = self.variance * factor**2
            parts.append(-0.5 * error_NK / variance - width * math.log(factor))
        return torch.stack(parts).logsumexp(dim=0).sum(dim=1)

    @torch.enable_grad()
    def slope(self, text: Text, z_KD: torch.Tensor) -> torch.Tensor:
        """How the log-likelihood grows with the embedding of each token, ``[L, E]``."""
        embedding_LE = self._knowledge.embedding[torch.tensor(text)].clone().requires_grad_()
        bottom = self._knowledge.bottom
        dtype = next(bottom.model.parameters()).dtype
        h_LE = bottom.hidden(inputs_embeds=embedding_LE.to(dtype).unsqueeze(0), use_cache=False)[0]
        likelihood = self.log_likelihood(self._tail(h_LE[-len(z_KD) :]).unsqueeze(0), z_KD).sum()
        (slope_LE,) = torch.autograd.grad(likelihood, embedding_LE)
        return slope_LE


def _batches(texts: Sequence[Text], tokens: int) -> Iterator[list[int]]:
    """Numbers of texts of about one length, at most so many tokens together with their padding."""
    batch: list[int] = []
    for number in sorted(range(len(texts)), key=lambda number: len(texts[number])):
        if batch and (len(batch) + 1) * len(texts[number]) > tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
