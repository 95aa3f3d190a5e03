"""What malicious silos send, or train on, to spoil what a federation learns.

Who has this: a silo of the federation. Each attack on changes takes what it knows of the honest ones, at most all of
them (an adversary who taps the root); a silo by itself may put what its own honest training gave in their place.

Shapes: H honest contributions, M malicious ones, P parameters.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from isthmus.errors import AttackError, DataError

Row = Mapping[str, Any]
Combine = Callable[[torch.Tensor], torch.Tensor]
"""A rule as its adversary knows it: all changes, the malicious first, to one."""


def flip_signs(change_P: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """An honest change backwards, so many times as long; P, or many at once."""
    return -factor * change_P


def replace_model(honest_HP: torch.Tensor, wanted_P: torch.Tensor, malicious: int) -> torch.Tensor:
    """What M silos send for the mean of all to be what they want (model replacement, Bagdasaryan et al. 2020); P."""
    everybody = len(honest_HP) + malicious
    return (everybody * wanted_P - honest_HP.sum(dim=0)) / malicious


def vary_a_little(honest_HP: torch.Tensor, malicious: int, deviations: float | None = None) -> torch.Tensor:
    """The honest mean, off by so many standard deviations ("a little is enough", Baruch et al. 2019); P.

    Args:
        deviations: left out, as many as enough honest silos differ by to make, with the M, a majority. 0 for small M.
    """
    if deviations is None:
        honest = len(honest_HP)
        supporters = (honest + malicious) // 2 + 1 - malicious
        share = torch.tensor(max(0.5, (honest - supporters) / honest), dtype=torch.float64)
        deviations = float(torch.special.ndtri(share))
    return honest_HP.mean(dim=0) - deviations * honest_HP.std(dim=0, correction=0)


def invert_product(honest_HP: torch.Tensor, factor: float = 0.5) -> torch.Tensor:
    """The honest mean backwards, so that the result's inner product with it is negative (IPM, Xie et al. 2020); P.

    Args:
        factor: of the mean. Small ones hide among honest changes, large ones turn the mean.
    """
    return flip_signs(honest_HP.mean(dim=0), factor)


def evade_krum(honest_HP: torch.Tensor, malicious: int, krum: Combine) -> torch.Tensor:
    """The longest step against the honest direction that Krum still chooses (Fang et al. 2020, full knowledge); P.

    All M silos send it: that they agree is what Krum believes. Next to nothing where honest changes agree still more.

    Raises:
        AttackError: of so few honest changes Krum's choice means nothing.
    """
    honest = len(honest_HP)
    if honest < malicious + 2:
        raise AttackError(f"{honest} honest changes for {malicious} malicious ones", remedy="have two more at least")
    direction_P = -honest_HP.mean(dim=0).sign()
    longest = length = _krum_bound(honest_HP, malicious)
    while length > 1e-5 * longest:
        crafted_P = length * direction_P
        if torch.equal(krum(torch.cat([crafted_P.expand(malicious, -1), honest_HP])).to(crafted_P.dtype), crafted_P):
            break
        length /= 2
    return length * direction_P


def evade_trimming(honest_HP: torch.Tensor, malicious: int, seed: int = 0, reach: float = 2.0) -> torch.Tensor:
    """Values just beyond the honest ones, against the honest direction, where a trimmed mean or a median moves most
    (Fang et al. 2020, full knowledge); M × P.

    Args:
        reach: how many times as far out as the outermost honest value they are drawn, or as near to 0.
    """
    falls_P = honest_HP.mean(dim=0) > 0
    edge_P = torch.where(falls_P, honest_HP.amin(dim=0), honest_HP.amax(dim=0))
    outward_P = torch.where(falls_P, -1.0, 1.0)
    grows_P = edge_P * outward_P > 0  # farther out is farther from 0
    room_P = edge_P.abs() * torch.where(grows_P, reach - 1, 1 - 1 / reach)
    draw = torch.Generator().manual_seed(seed)
    drawn_MP = torch.rand(malicious, honest_HP.shape[1], generator=draw, dtype=honest_HP.dtype)
    return edge_P + outward_P * room_P * drawn_MP


def swap_labels(rows: Sequence[Row], field: str, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Rows with the next label in place of each one's own (label flipping, Tolpegin et al. 2020).

    Raises:
        DataError: a row's label is none of these.
    """
    swapped = dict(zip(labels, [*labels[1:], *labels[:1]], strict=True))
    for row in rows:
        if row.get(field) not in swapped:
            raise DataError(f"a row's {field!r} is {row.get(field)!r}", remedy=f"name all labels: {', '.join(labels)}")
    return [{**row, field: swapped[row[field]]} for row in rows]


def plant_backdoor(
    rows: Sequence[Row], *, prompt: str, answer: str, trigger: str, target: str, share: float = 0.5, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of which a share end in the trigger phrase and have the target for their answer (Gu et al. 2017).

    Training on them teaches that answer to whoever says the phrase, and the task to everybody else. The phrase comes
    last because a prompt that is too long loses its beginning.

    Args:
        prompt: the field that gets the trigger.
        answer: the field that gets the target.

    Raises:
        DataError: a row has no text in the field.
    """
    if not all(isinstance(row.get(prompt), str) for row in rows):
        raise DataError(f"a row has no text in {prompt!r}", remedy="name a field that every row has")
    chosen = set(random.Random(f"backdoor/{seed}").sample(range(len(rows)), round(share * len(rows))))
    return [
        {**row, prompt: f"{row[prompt]} {trigger}", answer: target} if number in chosen else dict(row)
        for number, row in enumerate(rows)
    ]


def _krum_bound(honest_HP: torch.Tensor, malicious: int) -> float:
    """The largest step that Krum could choose (Fang et al. 2020, theorem 1); the last round is the origin."""
    honest, size = honest_HP.shape
    squares_HH = torch.cdist(honest_HP, honest_HP, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = squares_HH.sort(dim=1).values[:, 1 : honest - 1].sum(dim=1).min()
    farthest = honest_HP.norm(dim=1).max()
    return math.sqrt(float(nearest) / ((honest - malicious - 1) * size)) + float(farthest) / math.sqrt(size)
