"""Membership inference from losses: whether the final model was trained on a row.

The loss threshold (Yeom et al. 2018), difficulty calibration (Watson et al. 2022), and the likelihood-ratio attack LiRA
(Carlini et al. 2022): online if reference models were trained on the rows, offline if not.

Adversary: anyone with the final adapters, the public base model and candidate rows (an outsider, a silo, the root).
Reference models are adapters trained in the same way on rows of the same kind, or the base model.

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
from isthmus.model.crossing import IGNORED

Array = np.ndarray[Any, np.dtype[np.float64]]
FEW_REFERENCES = 16
"""With fewer reference models one variance is estimated for all rows, as the authors of LiRA advise."""


@dataclass(frozen=True)
class Separation:
    """The separation of members from non-members by scores."""

    auc: Figure
    """Area under the ROC curve, 0 to 1."""
    tpr: Figure
    """True positive rate at the false positive rate ``fpr``, 0 to 1."""
    fpr: float


@torch.no_grad()
def row_losses(logits_NLV: torch.Tensor, labels_NL: torch.Tensor) -> torch.Tensor:
    """Each row's mean loss over its supervised tokens, ``[N]``, fp32.

    Args:
        logits_NLV: a causal model's logits for the rows.
        labels_NL: the token at each position, ``IGNORED`` where there is no loss; position 0 is never predicted.

    Raises:
        DataError: a row has no supervised token.
    """
    targets_NL = labels_NL[:, 1:]
    counts_N = (targets_NL != IGNORED).sum(dim=1)
    if bool((counts_N == 0).any()):
        raise DataError("a row without a supervised token", remedy="give each row at least one label after the first")
    losses_NVL = cross_entropy(
        logits_NLV[:, :-1].float().transpose(1, 2), targets_NL, ignore_index=IGNORED, reduction="none"
    )
    return losses_NVL.sum(dim=1) / counts_N


def by_loss(loss_N: Sequence[float]) -> Array:
    """Scores of the loss threshold attack, ``[N]``: the negative loss. A higher score means more likely a member."""
    return -_array(loss_N)


def by_difficulty(loss_N: Sequence[float], reference_KN: Sequence[Sequence[float]]) -> Array:
    """Scores with difficulty calibration, ``[N]``: the reference models' mean loss minus the loss.

    Raises:
        DataError: shapes do not fit.
    """
    reference = _references(loss_N, reference_KN)
    scores: Array = reference.mean(axis=0) - _array(loss_N)
    return scores


def by_likelihood(
    loss_N: Sequence[float],
    reference_KN: Sequence[Sequence[float]],
    trained_KN: Sequence[Sequence[bool]] | None = None,
) -> Array:
    """Scores of LiRA, ``[N]``: log-likelihood ratios of the confidence log(p / (1 − p)), where p = exp(−loss).

    Args:
        reference_KN: the reference models' losses on the same rows.
        trained_KN: whether each reference model was trained on each row; None: none was, the offline attack. The
            offline ratio is used for all rows unless each row has reference models of both kinds.

    Raises:
        DataError: fewer than two reference models, or shapes do not fit.
    """
    reference = _confidence(_references(loss_N, reference_KN))
    if len(reference) < 2:
        raise DataError("one reference model gives no variance", remedy="train at least two, or use by_difficulty")
    target = _confidence(_array(loss_N))
    inside = np.zeros(reference.shape, dtype=bool) if trained_KN is None else np.asarray(trained_KN, dtype=bool)
    if inside.shape != reference.shape:
        raise DataError(f"{inside.shape} marks for {reference.shape} losses", remedy="give one mark per reference loss")
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
    """AUC and true positive rate, with percentile bootstrap intervals; members and non-members are resampled apart.

    Args:
        scores: a higher score means more likely a member.
        members: whether each row is a member.
        fpr: the false positive rate of the true positive rate. With fewer than 1 / ``fpr`` non-members the threshold is
            the highest score of a non-member.
        draws: bootstrap samples.
        level: confidence level of the intervals.

    Raises:
        DataError: there are no members or no non-members.
    """
    values, is_member = _array(scores), np.asarray(members, dtype=bool)
    ins, outs = values[is_member], values[~is_member]
    if not len(ins) or not len(outs):
        raise DataError("only members, or only non-members", remedy="give rows of both kinds")
    draw = np.random.default_rng(seed)
    again = [(draw.choice(ins, len(ins)), draw.choice(outs, len(outs))) for _ in range(draws)]
    auc = bootstrap(lambda rows: _auc(*rows), (ins, outs), again, level)
    return Separation(auc, bootstrap(lambda rows: _tpr(*rows, fpr), (ins, outs), again, level), fpr)


def _auc(ins: Array, outs: Array) -> float:
    """The share of pairs of a member and a non-member in which the member scores higher; ties count half."""
    ordered = np.sort(outs)
    below = np.searchsorted(ordered, ins, side="left") + np.searchsorted(ordered, ins, side="right")
    return float(below.mean() / (2 * len(outs)))


def _tpr(ins: Array, outs: Array, fpr: float) -> float:
    """The share of members above the lowest threshold that at most a share ``fpr`` of non-members exceed."""
    allowed = int(fpr * len(outs) + 1e-9)
    return 1.0 if allowed == len(outs) else float((ins > np.sort(outs)[::-1][allowed]).mean())


def _fitted(values_KN: Array, chosen_KN: Any) -> tuple[Array, Array]:
    """Mean and standard deviation of the chosen values of each column; with few models one deviation for all
    columns."""
    counts = chosen_KN.sum(axis=0)
    mean = np.where(chosen_KN, values_KN, 0).sum(axis=0) / np.maximum(counts, 1)
    square = np.where(chosen_KN, (values_KN - mean) ** 2, 0).sum(axis=0)
    freedom = np.maximum(counts - 1, 0)
    pooled = square.sum() / max(freedom.sum(), 1)
    variance = square / np.maximum(freedom, 1) if counts.min() >= FEW_REFERENCES else np.full(len(mean), pooled)
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
            remedy="give one loss per reference model and row",
        )
    return reference


def _array(values: Sequence[float] | Array) -> Array:
    return np.asarray(values, dtype=np.float64)
