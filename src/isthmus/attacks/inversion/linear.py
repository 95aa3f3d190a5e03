"""The linear inverter, an attack in closed form.

A crossing vector is modelled as an affine function of its token's public embedding plus a Gaussian residual, with an
own mean for each token that was seen often enough. Bayes' rule gives scores that are linear in the vector (Fisher's
linear discriminant), also for tokens without training data. Fitted to noised vectors, the residual includes the noise.

Shapes: T tokens, D width of a crossing vector, E width of the embedding, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from isthmus.errors import AttackError

SHRINK = 1e-4
"""Ridge penalty: share of a Gram matrix's mean diagonal that is added to its diagonal."""
SHRINKS = (0.3, 0.1, 0.03, 0.01, 1e-3, 0.9)
"""Candidates for the covariance's shrinkage to a sphere; the best on held-out tokens is used."""
HELD_OUT_TOKENS = 1000
"""Most held-out tokens for that choice."""
UNSEEN_COUNT = 0.5
"""Added to each token's count in the prior."""
VECTORS_A_PASS = 256
"""Vectors that are scored at a time."""


@dataclass(frozen=True, eq=False)
class LinearInverter:
    """Scores of every token, ``z @ weight.T + bias``: log-posteriors up to a constant per vector."""

    weight_VD: torch.Tensor
    bias_V: torch.Tensor
    prior_V: torch.Tensor
    """Log-frequency of each token."""

    @classmethod
    def fit(cls, z_TD: torch.Tensor, tokens_T: torch.Tensor, embedding_VE: torch.Tensor) -> LinearInverter:
        """Fit to own vectors and their tokens.

        Raises:
            AttackError: fewer than two tokens.
        """
        if len(tokens_T) < 2:
            raise AttackError(f"{len(tokens_T)} tokens to learn from", remedy="raise --own-rows")
        held = min(HELD_OUT_TOKENS, len(tokens_T) // 5)
        if not held:
            return _Fit(z_TD, tokens_T, embedding_VE).inverter(SHRINKS[0])
        part = _Fit(z_TD[:-held], tokens_T[:-held], embedding_VE)

        def right(shrink: float) -> int:
            best_T = part.inverter(shrink).best(z_TD[-held:], 1)[:, 0]
            return int((best_T == tokens_T[-held:]).sum())

        return _Fit(z_TD, tokens_T, embedding_VE).inverter(max(SHRINKS, key=right))

    def scores(self, z_TD: torch.Tensor, tokens_K: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of all tokens, ``[T, V]``, or of ``tokens_K``, ``[T, K]``."""
        if tokens_K is None:
            return z_TD @ self.weight_VD.T + self.bias_V
        return z_TD @ self.weight_VD[tokens_K].T + self.bias_V[tokens_K]

    def best(self, z_TD: torch.Tensor, count: int) -> torch.Tensor:
        """The likeliest tokens of each vector, ``[T, count]``, the likeliest first."""
        parts = [self.scores(part).topk(count, dim=1).indices for part in torch.split(z_TD, VECTORS_A_PASS)]
        return torch.cat(parts)


def ridge(x_TE: torch.Tensor, y_TD: torch.Tensor, shrink: float = SHRINK) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight ``[E, D]`` and bias ``[D]``, fp32, of the affine map from ``x`` to ``y`` by ridge regression.

    Args:
        shrink: penalty, as a share of the Gram matrix's mean diagonal.
    """
    x, y = x_TE.double(), y_TD.double()
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x
    gram.diagonal().add_(shrink * float(gram.diagonal().mean()) + 1e-12)
    weight = torch.linalg.solve(gram, x.T @ y)
    return weight.float(), (mean_y - mean_x @ weight).float()


def _token_offsets(residual_TD: torch.Tensor, tokens_T: torch.Tensor, counts_V: torch.Tensor) -> torch.Tensor:
    """Difference of each token's mean from the affine map, ``[V, D]``, shrunk towards 0 for rare tokens."""
    total_VD = torch.zeros(len(counts_V), residual_TD.shape[1]).index_add_(0, tokens_T, residual_TD)
    mean_VD = total_VD / counts_V.clamp_min(1).unsqueeze(1)
    repeated_T = counts_V[tokens_T] > 1
    if not repeated_T.any():
        return torch.zeros_like(mean_VD)
    freedom = int(repeated_T.sum()) - int((counts_V > 1).sum())
    within = float((residual_TD - mean_VD[tokens_T])[repeated_T].square().sum()) / max(freedom, 1)
    between = max(float(residual_TD[repeated_T].square().sum(dim=1).mean()) - within, 1e-12)
    share_V = counts_V / (counts_V + within / between)
    return mean_VD * share_V.unsqueeze(1)


class _Fit:
    """Token means and residual covariance, from which inverters with any shrinkage of the covariance follow.

    The means are inexact, most of all for unseen tokens. Directions with little residual variance get the largest
    weights, so errors of the means mislead there. The shrinkage limits that and is chosen on held-out tokens.
    """

    def __init__(self, z_TD: torch.Tensor, tokens_T: torch.Tensor, embedding_VE: torch.Tensor) -> None:
        counts_V = torch.bincount(tokens_T, minlength=len(embedding_VE)).float()
        weight_ED, bias_D = ridge(embedding_VE[tokens_T], z_TD)
        self._mean_VD = embedding_VE @ weight_ED + bias_D
        self._mean_VD += _token_offsets(z_TD - self._mean_VD[tokens_T], tokens_T, counts_V)
        residual_TD = z_TD - self._mean_VD[tokens_T]
        self._covariance_DD = residual_TD.T @ residual_TD / len(tokens_T)
        self._prior_V = ((counts_V + UNSEEN_COUNT) / (counts_V.sum() + UNSEEN_COUNT * len(counts_V))).log()

    def inverter(self, shrink: float) -> LinearInverter:
        """The inverter with the covariance shrunk by ``shrink``, 0 to 1, to a sphere."""
        sphere_DD = torch.eye(len(self._covariance_DD)) * (float(self._covariance_DD.diagonal().mean()) + 1e-12)
        weight_VD = self._mean_VD @ torch.linalg.inv(torch.lerp(self._covariance_DD, sphere_DD, shrink))
        bias_V = self._prior_V - 0.5 * (self._mean_VD * weight_VD).sum(dim=1)
        return LinearInverter(weight_VD, bias_V, self._prior_V)
