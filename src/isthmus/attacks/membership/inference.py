"""Was this row trained on? Membership inference on the final adapters, from losses.

The loss threshold (Yeom et al. 2018), calibration by difficulty (Watson et al. 2022) and the likelihood ratio with
reference models (LiRA, Carlini et al. 2022), online where references saw the rows and offline where none did.

Who has this: whoever has the final adapters and the public base model and holds rows to ask about: an outsider, any
silo, the root. Reference models are adapters trained likewise on rows of the same kind; the base model is one, too.

Shapes: N rows, K reference models, L label positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch.nn.functional import cross_entropy

from isthmus.attacks.score import Figure, bootstrap
from isthmus.errors import DataError

Array = np.ndarray[Any, np.dtype[np.float64]]
IGNORED = -100
FEW = 16
"""With fewer reference models, one variance is estimated for all rows together, as LiRA's authors advise."""


@dataclass(frozen=True)
class Separation:
    """How well scores tell members from others."""

    auc: Figure
    tpr: Figure
    """Share of members found at the false positive rate."""
    fpr: float


@torch.no_grad()
def row_losses(logits_NLV: torch.Tensor, labels_NL: torch.Tensor) -> torch.Tensor:
    """Each row's mean loss over its supervised tokens, ``[N]``.

    Args:
        logits_NLV: as a model gives them for these positions.
        labels_NL: as for training: the token at a position, -100 where there is no loss. Position 0 has no prediction.

    Raises:
        DataError: a row has no supervised token.
    """
    due_NL = labels_NL[:, 1:]
    counts_N = (due_NL != IGNORED).sum(dim=1)
    if bool((counts_N == 0).any()):
        raise DataError("a row without a supervised token", remedy="give each row at least one label after the first")
    losses_NVL = cross_entropy(
        logits_NLV[:, :-1].float().transpose(1, 2), due_NL, ignore_index=IGNORED, reduction="none"
    )
    return losses_NVL.sum(dim=1) / counts_N


def by_loss(loss_N: Sequence[float]) -> Array:
    """Scores, the higher the likelier a member: the loss alone."""
    return -_array(loss_N)


def by_difficulty(loss_N: Sequence[float], reference_KN: Sequence[Sequence[float]]) -> Array:
    """Scores: how much lower the loss is than reference models have it."""
    reference = _references(loss_N, reference_KN)
    scores: Array = reference.mean(axis=0) - _array(loss_N)
    return scores


def by_likelihood(
    loss_N: Sequence[float],
    reference_KN: Sequence[Sequence[float]],
    trained_KN: Sequence[Sequence[bool]] | None = None,
) -> Array:
    """Scores: the likelihood ratio of LiRA over the confidences log(p / (1 − p)), where p = exp(−loss).

    Args:
        reference_KN: the reference models' losses on the same rows.
        trained_KN: which rows each of them was trained on; None: none, which is the offline attack. For a row that
            models of only one kind are known of, the offline ratio stands in.

    Raises:
        DataError: fewer than two reference models, or shapes that do not fit.
    """
    reference = _confidence(_references(loss_N, reference_KN))
    if len(reference) < 2:
        raise DataError("one reference model gives no variance", remedy="train two at least, or score by difficulty")
    target = _confidence(_array(loss_N))
    inside = np.zeros(reference.shape, dtype=bool) if trained_KN is None else np.asarray(trained_KN, dtype=bool)
    if inside.shape != reference.shape:
        raise DataError(f"{inside.shape} marks for {reference.shape} losses", remedy="mark each loss of each model")
    out_mean, out_sd = _fitted(reference, ~inside)
    in_mean, in_sd = _fitted(reference, inside)
    offline = norm.logcdf(target, out_mean, out_sd) - norm.logsf(target, out_mean, out_sd)
    online = norm.logpdf(target, in_mean, in_sd) - norm.logpdf(target, out_mean, out_sd)
    both = inside.any(axis=0) & (~inside).any(axis=0)
    scores: Array = np.where(both, online, offline) if both.all() else offline
    return scores


def separation(
    scores: Sequence[float] | Array,
    members: Sequence[bool],
    *,
    fpr: float = 0.01,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Separation:
    """AUC and true positive rate, with percentile bootstrap intervals over rows (members and others drawn apart).

    Args:
        fpr: the false positive rate at which the true positive rate is read off; with fewer others than 1 / fpr it
            means that no other scores as high.

    Raises:
        DataError: members or others are missing.
    """
    values, told = _array(scores), np.asarray(members, dtype=bool)
    ins, outs = values[told], values[~told]
    if not len(ins) or not len(outs):
        raise DataError("rows of one kind only", remedy="give members and rows that were not trained on")
    draw = np.random.default_rng(seed)
    again = [(draw.choice(ins, len(ins)), draw.choice(outs, len(outs))) for _ in range(draws)]
    auc = bootstrap(lambda rows: _auc(*rows), (ins, outs), again, level)
    return Separation(auc, bootstrap(lambda rows: _tpr(*rows, fpr), (ins, outs), again, level), fpr)


def _auc(ins: Array, outs: Array) -> float:
    """The share of pairs of a member and another in which the member scores higher; ties count half."""
    ordered = np.sort(outs)
    below = np.searchsorted(ordered, ins, side="left") + np.searchsorted(ordered, ins, side="right")
    return float(below.mean() / (2 * len(outs)))


def _tpr(ins: Array, outs: Array, fpr: float) -> float:
    """The share of members above the highest score that more than ``fpr`` of the others reach."""
    allowed = int(fpr * len(outs) + 1e-9)
    return 1.0 if allowed == len(outs) else float((ins > np.sort(outs)[::-1][allowed]).mean())


def _fitted(values_KN: Array, chosen_KN: Any) -> tuple[Array, Array]:
    """Mean and standard deviation of the chosen of each column; one deviation for all where models are few."""
    counts = chosen_KN.sum(axis=0)
    mean = np.where(chosen_KN, values_KN, 0).sum(axis=0) / np.maximum(counts, 1)
    square = np.where(chosen_KN, (values_KN - mean) ** 2, 0).sum(axis=0)
    freedom = np.maximum(counts - 1, 0)
    pooled = square.sum() / max(freedom.sum(), 1)
    variance = square / np.maximum(freedom, 1) if counts.min() >= FEW else np.full(len(mean), pooled)
    return mean, np.sqrt(np.maximum(variance, 1e-12))


def _confidence(loss: Array) -> Array:
    """log(p / (1 − p)) without overflow: −loss − log(1 − exp(−loss))."""
    safe = np.maximum(loss, 1e-12)
    confidence: Array = -safe - np.log(-np.expm1(-safe))
    return confidence


def _references(loss_N: Sequence[float], reference_KN: Sequence[Sequence[float]]) -> Array:
    reference = np.asarray(reference_KN, dtype=np.float64)
    if reference.ndim != 2 or reference.shape[1] != len(loss_N):
        raise DataError(
            f"reference losses of shape {reference.shape} for {len(loss_N)} rows",
            remedy="give one loss a reference model and row",
        )
    return reference


def _array(values: Sequence[float] | Array) -> Array:
    return np.asarray(values, dtype=np.float64)
