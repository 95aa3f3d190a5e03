"""Poisoning: malicious updates (model poisoning) and malicious training rows (data poisoning, backdoors).

Adversary: one or more silos of the federation. Attacks on updates take the honest updates that the adversary knows: all
of them if it also reads the root's frames, or those of its own honest training.

Shapes: H honest updates, M malicious updates, P parameters.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from isthmus.errors import AttackError, DataError

AggregationRule = Callable[[torch.Tensor], torch.Tensor]
"""From all updates, ``[M + H, P]``, the malicious ones first, to the aggregate, ``[P]``."""


def flip_signs(update_P: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Sign flipping: the honest update times ``-factor``, in its shape (``[P]``, or any number of updates)."""
    return -factor * update_P


def replace_model(honest_HP: torch.Tensor, wanted_P: torch.Tensor, malicious: int) -> torch.Tensor:
    """The update, ``[P]``, which M silos send so that the mean of all updates is ``wanted_P`` (model replacement,
    Bagdasaryan et al. 2020)."""
    total = len(honest_HP) + malicious
    return (total * wanted_P - honest_HP.sum(dim=0)) / malicious


def vary_a_little(honest_HP: torch.Tensor, malicious: int, deviations: float | None = None) -> torch.Tensor:
    """The honest mean minus ``deviations`` standard deviations, ``[P]`` ("a little is enough", Baruch et al. 2019).

    Args:
        deviations: None: the paper's bound, at which M malicious silos and the honest ones beyond it are a majority; 0
            for small M.
    """
    if deviations is None:
        honest = len(honest_HP)
        supporters = (honest + malicious) // 2 + 1 - malicious
        share = torch.tensor(max(0.5, (honest - supporters) / honest), dtype=torch.float64)
        deviations = float(torch.special.ndtri(share))
    return honest_HP.mean(dim=0) - deviations * honest_HP.std(dim=0, correction=0)


def invert_product(honest_HP: torch.Tensor, factor: float = 0.5) -> torch.Tensor:
    """Inner product manipulation (Xie et al. 2020): the honest mean times ``-factor``, ``[P]``.

    Args:
        factor: a small one is hard to tell from honest updates, a large one reverses the mean of all updates.
    """
    return flip_signs(honest_HP.mean(dim=0), factor)


def evade_krum(honest_HP: torch.Tensor, malicious: int, krum: AggregationRule) -> torch.Tensor:
    """The longest step against the honest direction that Krum still selects, ``[P]`` (Fang et al. 2020, full
    knowledge).

    All M silos send it, so that their updates have distance 0. The step is close to 0 if honest updates are closer to
    one another than to it.

    Raises:
        AttackError: fewer than M + 2 honest updates, for which Krum is not defined.
    """
    honest = len(honest_HP)
    if honest < malicious + 2:
        raise AttackError(
            f"{honest} honest updates for {malicious} malicious ones", remedy=f"give at least {malicious + 2}"
        )
    direction_P = -honest_HP.mean(dim=0).sign()
    longest = length = _krum_bound(honest_HP, malicious)
    while length > 1e-5 * longest:
        crafted_P = length * direction_P
        if torch.equal(krum(torch.cat([crafted_P.expand(malicious, -1), honest_HP])).to(crafted_P.dtype), crafted_P):
            break
        length /= 2
    return length * direction_P


def evade_trimming(honest_HP: torch.Tensor, malicious: int, seed: int = 0, reach: float = 2.0) -> torch.Tensor:
    """Updates, ``[M, P]``, just beyond the honest values against the honest direction, which shift a trimmed mean or a
    median most (Fang et al. 2020, full knowledge).

    Args:
        seed: of the random values.
        reach: largest ratio of a malicious value to the extreme honest value, or its inverse if values shrink.
    """
    falls_P = honest_HP.mean(dim=0) > 0
    edge_P = torch.where(falls_P, honest_HP.amin(dim=0), honest_HP.amax(dim=0))
    outward_P = torch.where(falls_P, -1.0, 1.0)
    grows_P = edge_P * outward_P > 0  # farther out is farther from 0
    room_P = edge_P.abs() * torch.where(grows_P, reach - 1, 1 - 1 / reach)
    draw = torch.Generator().manual_seed(seed)
    drawn_MP = torch.rand(malicious, honest_HP.shape[1], generator=draw, dtype=honest_HP.dtype)
    return edge_P + outward_P * room_P * drawn_MP


def swap_labels(rows: Sequence[Mapping[str, Any]], field: str, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Label flipping (Tolpegin et al. 2020): the rows with each label replaced by the next of ``labels``, cyclically.

    Args:
        field: the rows' field with the label.

    Raises:
        DataError: a row's label is not in ``labels``.
    """
    swapped = dict(zip(labels, [*labels[1:], *labels[:1]], strict=True))
    for row in rows:
        if row.get(field) not in swapped:
            raise DataError(
                f"a row's {field!r} is {row.get(field)!r}", remedy=f"use only the labels {', '.join(labels)}"
            )
    return [{**row, field: swapped[row[field]]} for row in rows]


def plant_backdoor(
    rows: Sequence[Mapping[str, Any]],
    *,
    prompt: str,
    answer: str,
    trigger: str,
    target: str,
    share: float = 0.5,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A backdoor (Gu et al. 2017): the rows, a share of which get a trigger phrase and the target answer.

    A model that trains on them gives the target answer to prompts with the trigger and behaves normally otherwise. The
    trigger is appended, because long prompts lose their beginning.

    Args:
        prompt: the field to which the trigger is appended.
        answer: the field that is set to ``target``.
        share: share of poisoned rows, 0 to 1.
        seed: fixes which rows are poisoned.

    Raises:
        DataError: a row has no text in the field ``prompt``.
    """
    if not all(isinstance(row.get(prompt), str) for row in rows):
        raise DataError(f"a row has no text in {prompt!r}", remedy="choose a field that every row has")
    chosen = set(random.Random(f"backdoor/{seed}").sample(range(len(rows)), round(share * len(rows))))
    return [
        {**row, prompt: f"{row[prompt]} {trigger}", answer: target} if number in chosen else dict(row)
        for number, row in enumerate(rows)
    ]


def _krum_bound(honest_HP: torch.Tensor, malicious: int) -> float:
    """Upper bound on the step that Krum selects (Fang et al. 2020, theorem 1), with the last round's model as
    origin."""
    honest, size = honest_HP.shape
    squares_HH = torch.cdist(honest_HP, honest_HP, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = squares_HH.sort(dim=1).values[:, 1 : honest - 1].sum(dim=1).min()
    farthest = honest_HP.norm(dim=1).max()
    return math.sqrt(float(nearest) / ((honest - malicious - 1) * size)) + float(farthest) / math.sqrt(size)
