"""Labels from the loss gradients that a silo's top sends to the trunk, where answers are choices.

Three adversaries, from weakest to strongest: one who only groups gradients by direction (Li et al. 2022, "Label leakage
and protection in two-party split learning"), one with a colluding silo's labelled gradients, and one who holds top's
weights and works out the gradient of every choice.

Shapes: N rows, L positions of one row, D width.
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


def answer_gradients(e_TD: torch.Tensor, lengths: Sequence[int], answer: int = 1) -> torch.Tensor:
    """Each row's gradient where its answer's first token is predicted, ``[N, D]``.

    Who has this: the trunk (frames ``Forward`` and ``Backward`` of a step).

    Args:
        e_TD: the rows' gradients one after another, as they arrived.
        answer: tokens of an answer; the row ends with it.

    Raises:
        DataError: a row is too short to hold prompt and answer.
    """
    if min(lengths) <= answer or sum(lengths) != len(e_TD):
        raise DataError(
            f"{len(e_TD)} gradients for rows of {list(lengths)} tokens with answers of {answer}",
            remedy="give one gradient a token, and rows longer than their answer",
        )
    ends = torch.tensor(lengths).cumsum(0)
    return e_TD[ends - 1 - answer]


def cluster_labels(e_ND: torch.Tensor, classes: int, *, seed: int = 0) -> list[int]:
    """Rows grouped by the direction of their gradients; which group is which label stays open.

    Who has this: the trunk alone (gradients), without any weights. Opposite labels pull in opposite directions: for two
    classes this is the sign along the main axis, for more it is k-means on the sphere.
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


def agreement(groups: Sequence[int], labels: Sequence[int]) -> float:
    """Share of rows whose group stands for their label, under the best naming of the groups."""
    counts = confusion_matrix(labels, groups)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / len(labels))


def named(groups: Sequence[int], labels: Sequence[int]) -> list[int]:
    """Each row's label, by the naming of the groups that ``agreement`` takes: it favours the attack."""
    kinds = sorted({*groups, *labels})
    counts = confusion_matrix(labels, groups, labels=kinds)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    names = {kinds[column]: kinds[row] for row, column in zip(rows, columns, strict=True)}
    return [names[group] for group in groups]


class LabelClassifier:
    """Learns labels from gradients whose labels are known.

    Who has this: the trunk with one colluding silo, whose labelled gradients it noises as the others do (so the attack
    knows the defence). Of several linear classifiers the one that does best in cross-validation is kept.

    Args:
        e_ND, labels: the colluder's.
    """

    def __init__(self, e_ND: torch.Tensor, labels: Sequence[int]) -> None:
        features, known = _features(e_ND), np.asarray(labels)
        folds = min(FOLDS, int(np.bincount(known)[np.unique(known)].min()))
        if len(np.unique(known)) < 2 or folds < 2:
            raise DataError(
                "the colluder's rows have one label, or a label with one row", remedy="give two rows of each label"
            )
        candidates = _classifiers()
        scores = [cross_val_score(one, features, known, cv=folds).mean() for one in candidates]
        self._classifier = candidates[int(np.argmax(scores))].fit(features, known)

    def predict(self, e_ND: torch.Tensor) -> list[int]:
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
    """The choice whose gradient, worked out with top and passed through the defence, is nearest to the one that came.

    Who has this: the trunk (``g_LD`` is its own result, ``e_LD`` what came back for the same row), with top's public
    base weights, or the shared ones of a colluding silo.

    Args:
        choices: the tokens of each possible answer; the row ends with one of them.
        weight: supervised tokens of the batch, which the commit tells; None: unknown, directions are compared.
        clip: the recipe's, for gradients.

    Returns:
        The number of the choice. Under Gaussian noise this is the likeliest one.
    """
    lens = Lens(top, g_LD)
    distances = []
    for choice in choices:
        at_S = torch.arange(lens.length - 1 - len(choice), lens.length - 1)
        due_LD = clipped(lens.gradient(at_S, torch.tensor(choice), weight or 1.0), clip if weight else 0.0)
        if weight is None:
            distances.append(-float((due_LD * e_LD).sum() / due_LD.norm().clamp_min(1e-30)))
        else:
            distances.append(float((due_LD - e_LD).square().sum()))
    return int(np.argmin(distances))


def _sharpness(directions_ND: torch.Tensor, groups_N: torch.Tensor) -> float:
    """How far the directions lie within their groups: the sum of the groups' resultant lengths."""
    return sum(float(directions_ND[groups_N == group].sum(dim=0).norm()) for group in (0, 1))


def _features(e_ND: torch.Tensor) -> Any:
    """Directions, and the logarithm of the length."""
    norms_N1 = e_ND.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return torch.cat([e_ND / norms_N1, norms_N1.log()], dim=1).double().cpu().numpy()


def _classifiers() -> list[Any]:
    return [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000)) for strength in (1e-3, 1e-1, 10)
    ] + [LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")]
