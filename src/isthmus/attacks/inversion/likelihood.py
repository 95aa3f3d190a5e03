"""The likelihood of a text given what crossed, for an adversary who runs bottom and knows or has estimated the
boundary.

With ``knowledge.BoundaryMap`` the likelihood of any text is Gaussian, so nothing is trained. Texts may be longer than
the crossing: only as many last positions as crossed are compared.

Shapes: N texts, L tokens of the longest, K last positions that crossed, D width of a crossing vector, E width of the
model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.template import Text

TOKENS_A_PASS = {"cpu": 2048, "cuda": 32768}
"""Tokens, padding included, per pass through bottom, by device type."""
NOISE_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Possible noise of a token relative to the usual one, where the noise depends on a token's sensitivity."""
LEAST_VARIANCE = 1e-9
"""Smallest variance, as a share of the crossing vectors' mean square, for rounding errors."""


class BoundaryLikelihood:
    """Log-likelihoods of texts given the vectors that crossed.

    Raises:
        AttackError: the view has no own rows from which to estimate the noise.
    """

    def __init__(self, knowledge: Knowledge) -> None:
        pairs = knowledge.view.needs("pairs").pairs
        self._knowledge, self._boundary_map = knowledge, knowledge.boundary_map
        power = float(torch.cat([pair.crossing.hidden_LD.float() for pair in pairs[:64]]).square().mean())
        self.variance = self._boundary_map.mean + LEAST_VARIANCE * power
        """Variance of a coordinate around its expected value."""
        self._factors = NOISE_FACTORS if knowledge.view.recipe.sensitivity is not None else (1.0,)

    @torch.no_grad()
    def expected(self, texts: Sequence[Text], count: int) -> torch.Tensor:
        """The noiseless crossing of each text's last ``count`` positions, ``[N, K, D]``; no text may be shorter."""
        expected: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        for numbers in _batches(texts, TOKENS_A_PASS[self._knowledge.embedding.device.type]):
            ids_NL = pad_sequence([torch.tensor(texts[number]) for number in numbers], batch_first=True)
            h_NLE = self._knowledge.bottom.hidden(input_ids=ids_NL, use_cache=False)
            for number, h_LE in zip(numbers, h_NLE, strict=True):
                length = len(texts[number])
                expected[number] = self._boundary_map(h_LE[length - count : length])
        return torch.stack(expected)

    def log_likelihood(self, mean_NKD: torch.Tensor, z_KD: torch.Tensor) -> torch.Tensor:
        """Log-likelihood of ``z_KD`` given each expected crossing, ``[N]``, in nats up to a constant.

        It is marginal over the noise factor of each position.
        """
        error_NK = (mean_NKD - z_KD).square().sum(dim=2)
        width, parts = z_KD.shape[1], []
        for factor in self._factors:
            variance = self.variance * factor**2
            parts.append(-0.5 * error_NK / variance - width * math.log(factor))
        return torch.stack(parts).logsumexp(dim=0).sum(dim=1)

    @torch.enable_grad()
    def slope(self, text: Text, z_KD: torch.Tensor) -> torch.Tensor:
        """Gradient of the log-likelihood by the embedding of each token, ``[L, E]``."""
        embedding_LE = self._knowledge.embedding[torch.tensor(text)].clone().requires_grad_()
        bottom = self._knowledge.bottom
        dtype = next(bottom.model.parameters()).dtype
        h_LE = bottom.hidden(inputs_embeds=embedding_LE.to(dtype).unsqueeze(0), use_cache=False)[0]
        likelihood = self.log_likelihood(self._boundary_map(h_LE[-len(z_KD) :]).unsqueeze(0), z_KD).sum()
        (slope_LE,) = torch.autograd.grad(likelihood, embedding_LE)
        return slope_LE


def _batches(texts: Sequence[Text], tokens: int) -> Iterator[list[int]]:
    """Indices of texts in batches of similar length, each with at most ``tokens`` tokens, padding included."""
    batch: list[int] = []
    for number in sorted(range(len(texts)), key=lambda number: len(texts[number])):
        if batch and (len(batch) + 1) * len(texts[number]) > tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
