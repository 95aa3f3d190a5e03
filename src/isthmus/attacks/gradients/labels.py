"""Label leakage from the loss gradients that a silo sends to the trunk, where answers are choices.

Three adversaries, from weak to strong: one that clusters gradients by direction (Li et al. 2022, "Label leakage and
protection in two-party split learning"), one with a colluding silo's labelled gradients, and one with top's weights,
who computes the gradient of each choice.

Shapes: N rows, T vectors of all rows, L positions of one row, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from isthmus.attacks.gradients.lens import Lens, clipped
from isthmus.errors import DataError
from isthmus.model.cut import Part

FOLDS = 5
"""Folds of the cross-validation."""


def answer_gradients(e_TD: torch.Tensor, lengths: Sequence[int], answer: int = 1) -> torch.Tensor:
    """Each row's gradient at the position that predicts its answer's first token, ``[N, D]``.

    Adversary: the trunk (frames ``Forward`` and ``Backward`` of a step).

    Args:
        e_TD: the received gradients of all rows, concatenated.
        lengths: number of positions of each row.
        answer: number of tokens of an answer with its filler, with which the row ends.

    Raises:
        DataError: a row is too short to hold prompt and answer.
    """
    if min(lengths) <= answer or sum(lengths) != len(e_TD):
        raise DataError(
            f"{len(e_TD)} gradients for rows of {list(lengths)} tokens with answers of {answer}",
            remedy="give one gradient per token, and rows longer than their answer",
        )
    ends = torch.tensor(lengths).cumsum(0)
    return e_TD[ends - 1 - answer]


def cluster_labels(e_ND: torch.Tensor, classes: int, *, seed: int = 0) -> list[int]:
    """Cluster of each row by the direction of its gradient; which cluster is which label remains unknown.

    Adversary: the trunk alone (gradients), without any weights. Two classes have opposite directions: the sign along
    the main axis separates them. More classes are clustered by k-means on the sphere.
    """
    directions_ND = torch.nn.functional.normalize(e_ND.double(), dim=1)
    if classes == 2:
        _, _, axes = torch.linalg.svd(directions_ND, full_matrices=False)
        starts = [(directions_ND @ axes[0] > 0).long()]
        along = directions_ND - directions_ND.mean(dim=0)
        starts.append((along @ torch.linalg.svd(along, full_matrices=False)[2][0] > 0).long())
        sharpest = max(starts, key=lambda groups: _sharpness(directions_ND, groups))
        return [int(group) for group in sharpest]
    fitted = KMeans(classes, n_init=20, random_state=seed).fit(directions_ND.cpu().numpy())
    return [int(group) for group in fitted.labels_]


def clustering_accuracy(groups: Sequence[int], labels: Sequence[int]) -> float:
    """Share of rows whose cluster has their label, under the best assignment of labels to clusters, 0 to 1."""
    counts = confusion_matrix(labels, groups)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / len(labels))


def relabel_clusters(groups: Sequence[int], labels: Sequence[int]) -> list[int]:
    """Each row's label under the best assignment of labels to clusters, which uses the truth and so favours the
    attack."""
    kinds = sorted({*groups, *labels})
    counts = confusion_matrix(labels, groups, labels=kinds)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    names = {kinds[column]: kinds[row] for row, column in zip(rows, columns, strict=True)}
    return [names[group] for group in groups]


class LabelClassifier:
    """A linear classifier of labels, trained on gradients with known labels.

    Adversary: the trunk with a colluding silo, whose gradients are clipped and noised like the victim's. The best of
    several classifiers in cross-validation is used.

    Args:
        e_ND: the colluder's gradients.
        labels: their labels.

    Raises:
        DataError: fewer than two labels, or a label with one row.
    """

    def __init__(self, e_ND: torch.Tensor, labels: Sequence[int]) -> None:
        features, known = _features(e_ND), np.asarray(labels)
        folds = min(FOLDS, int(np.bincount(known)[np.unique(known)].min()))
        if len(np.unique(known)) < 2 or folds < 2:
            raise DataError(
                "the colluder's rows have one label, or a label with one row",
                remedy="give at least two rows of each label",
            )
        candidates = _classifiers()
        scores = [cross_val_score(one, features, known, cv=folds).mean() for one in candidates]
        self._classifier = candidates[int(np.argmax(scores))].fit(features, known)

    def predict(self, e_ND: torch.Tensor) -> list[int]:
        """The label of each gradient."""
        return [int(label) for label in self._classifier.predict(_features(e_ND))]


def match_choices(
    top: Part,
    g_LD: torch.Tensor,
    e_LD: torch.Tensor,
    choices: Sequence[Sequence[int]],
    *,
    weight: float | None = None,
    clip: float = 0.0,
) -> int:
    """The index of the choice whose gradient, computed with top and clipped, is nearest to the received one.

    With Gaussian noise this is the maximum-likelihood choice. Adversary: the trunk, with top's public base weights or a
    colluding silo's shared adapters.

    Args:
        top: the adversary's top.
        g_LD: the trunk's result for the row.
        e_LD: the received gradient for the row.
        choices: the tokens of each possible answer; the row ends with one of them, filled up to the longest.
        weight: the batch's, from the commit; None: unknown, only directions are compared.
        clip: the recipe's clipping norm of gradients; 0: none.
    """
    lens = Lens(top, g_LD)
    first, distances = lens.length - 1 - max(map(len, choices)), []
    for choice in choices:
        at_S = torch.arange(first, first + len(choice))
        expected_LD = clipped(lens.gradient(at_S, torch.tensor(choice), weight or 1.0), clip if weight else 0.0)
        if weight is None:
            distances.append(-float((expected_LD * e_LD).sum() / expected_LD.norm().clamp_min(1e-30)))
        else:
            distances.append(float((expected_LD - e_LD).square().sum()))
    return int(np.argmin(distances))


def _sharpness(directions_ND: torch.Tensor, groups_N: torch.Tensor) -> float:
    """Concentration of the directions within their clusters: the sum of the clusters' resultant lengths."""
    return sum(float(directions_ND[groups_N == group].sum(dim=0).norm()) for group in (0, 1))


def _features(e_ND: torch.Tensor) -> Any:
    """Features of gradients: direction and log norm, ``[N, D + 1]``."""
    norms_N1 = e_ND.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return torch.cat([e_ND / norms_N1, norms_N1.log()], dim=1).double().cpu().numpy()


def _classifiers() -> list[Any]:
    return [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000)) for strength in (1e-3, 1e-1, 10)
    ] + [LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")]
