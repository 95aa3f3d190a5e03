"""A learned linear inverter, in closed form.

What crosses at a token is taken as an affine function of the token's public embedding plus a Gaussian residual, with
a mean of its own for each token that was seen often enough. Bayes' rule then gives scores that are linear in what
crossed (Fisher's linear discriminant), for tokens never seen in training, too. Fitted to noised vectors, the noise is
part of the residual.

Shapes: T tokens, D width of what crosses, E width of the embedding, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from isthmus.errors import AttackError

SHRINK = 1e-4
"""Share of its mean that is added to the diagonal of a matrix before it is inverted."""
SHRINKS = (0.3, 0.1, 0.03, 0.01, 1e-3, 0.9)
"""Of which the one that recovers most of held-out tokens is chosen."""
HELD_OUT = 1000
"""Tokens that choose it, at most."""
UNSEEN = 0.5
"""What a token counts that was never seen."""
CHUNK = 256


@dataclass(frozen=True, eq=False)
class LinearInverter:
    """Scores of every token: ``z @ weight.T + bias``, log-posteriors but for a constant a row."""

    weight_VD: torch.Tensor
    bias_V: torch.Tensor
    prior_V: torch.Tensor
    """Log-frequency of each token."""

    @classmethod
    def fit(cls, z_TD: torch.Tensor, tokens_T: torch.Tensor, embedding_VE: torch.Tensor) -> LinearInverter:
        """From vectors of the adversary's own and their tokens.

        Raises:
            AttackError: too few of them.
        """
        if len(tokens_T) < 2:
            raise AttackError(f"{len(tokens_T)} tokens to learn from", remedy="give the adversary more rows")
        held = min(HELD_OUT, len(tokens_T) // 5)
        if not held:
            return _Fit(z_TD, tokens_T, embedding_VE).inverter(SHRINKS[0])
        part = _Fit(z_TD[:-held], tokens_T[:-held], embedding_VE)

        def right(shrink: float) -> int:
            best_T = part.inverter(shrink).best(z_TD[-held:], 1)[:, 0]
            return int((best_T == tokens_T[-held:]).sum())

        return _Fit(z_TD, tokens_T, embedding_VE).inverter(max(SHRINKS, key=right))

    def scores(self, z_TD: torch.Tensor, tokens_K: torch.Tensor | None = None) -> torch.Tensor:
        """Of all tokens, ``[T, V]``, or of these, ``[T, K]``."""
        if tokens_K is None:
            return z_TD @ self.weight_VD.T + self.bias_V
        return z_TD @ self.weight_VD[tokens_K].T + self.bias_V[tokens_K]

    def best(self, z_TD: torch.Tensor, count: int) -> torch.Tensor:
        """The likeliest tokens of each vector, ``[T, count]``, the best first."""
        parts = [self.scores(part).topk(count, dim=1).indices for part in torch.split(z_TD, CHUNK)]
        return torch.cat(parts)


def ridge(x_TE: torch.Tensor, y_TD: torch.Tensor, shrink: float = SHRINK) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[E, D]`` and bias ``[D]`` of an affine map from ``x`` to ``y``: least squares, small weights."""
    x, y = x_TE.double(), y_TD.double()
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x
    gram.diagonal().add_(shrink * float(gram.diagonal().mean()) + 1e-12)
    weight = torch.linalg.solve(gram, x.T @ y)
    return weight.float(), (mean_y - mean_x @ weight).float()


def _own(residual_TD: torch.Tensor, tokens_T: torch.Tensor, counts_V: torch.Tensor) -> torch.Tensor:
    """By how much each token's mean differs from the affine map, shrunk to nothing where it was seldom seen."""
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
    """Means and residuals; an inverter follows from how far the residuals' covariance is shrunk to a sphere.

    The means are not exact, least of all of tokens that were never seen. Directions in which residuals hardly vary
    would tell most if they were, and mislead as they are; so shrinking is learned from rows that are held out.
    """

    def __init__(self, z_TD: torch.Tensor, tokens_T: torch.Tensor, embedding_VE: torch.Tensor) -> None:
        counts_V = torch.bincount(tokens_T, minlength=len(embedding_VE)).float()
        weight_ED, bias_D = ridge(embedding_VE[tokens_T], z_TD)
        self._mean_VD = embedding_VE @ weight_ED + bias_D
        self._mean_VD += _own(z_TD - self._mean_VD[tokens_T], tokens_T, counts_V)
        residual_TD = z_TD - self._mean_VD[tokens_T]
        self._covariance_DD = residual_TD.T @ residual_TD / len(tokens_T)
        self._prior_V = ((counts_V + UNSEEN) / (counts_V.sum() + UNSEEN * len(counts_V))).log()

    def inverter(self, shrink: float) -> LinearInverter:
        sphere_DD = torch.eye(len(self._covariance_DD)) * (float(self._covariance_DD.diagonal().mean()) + 1e-12)
        weight_VD = self._mean_VD @ torch.linalg.inv(torch.lerp(self._covariance_DD, sphere_DD, shrink))
        bias_V = self._prior_V - 0.5 * (self._mean_VD * weight_VD).sum(dim=1)
        return LinearInverter(weight_VD, bias_V, self._prior_V)
