"""What crosses of a batch to the trunk: which positions, in which packing, and what stays in the silo meanwhile.

Shapes: B rows, L new positions, K of them (the last) with a label or without, T positions that cross (row after row),
D the model's width, W numbers that cross of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from isthmus.model.cache import SplitCache
from isthmus.model.packing import Packing
from isthmus.privacy.subjects import Subjects

IGNORED = -100
"""Label of a position without loss, as in transformers."""


@dataclass(frozen=True)
class FreshExample:
    """One sequence whose hidden states are released for the first time, where each is released once."""

    number: int
    """The trunk keeps the states under it."""
    h_LW: torch.Tensor
    subjects: Subjects


@dataclass(frozen=True)
class Outbound:
    """One batch on its way to the trunk. ``SplitForCausalLM.outbound`` makes it; all that crosses is decided there.

    The first four fields are what a trunk reads; the others stay in the silo until the answer is there.
    """

    lengths: list[int]
    """Positions that cross, of each sequence."""
    h_TW: torch.Tensor | None
    """Hidden states to send: bottom's result, narrowed if there is a bottleneck, and with a gradient already clipped.
    None: bottom did not run, since ``examples`` were released before."""
    subjects: Subjects | None = None
    """The records that the sequences belong to; None where nothing leaves the silo (a draft)."""
    examples: list[int] | None = None
    """Where each example is released once: the sequences' numbers, which go in place of ``h_TW``."""
    fresh: list[FreshExample] = field(default_factory=list)
    """Those among the examples that were never released before."""
    cache: SplitCache | None = None
    """The generation's KV cache; None: each sequence starts at position 0."""
    packing: Packing | None = None
    """Of the positions that cross."""
    h_BLD: torch.Tensor | None = None
    """Bottom's result."""
    like: torch.Tensor | None = None
    """Any tensor on the device and of the dtype that the trunk's answer is wanted in; None: as ``h_TW``."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Arguments that top's forward shares with bottom's."""


def crossing(
    real_BL: torch.Tensor,
    tail: int | None,
    labels_BK: torch.Tensor | None = None,
    targets_BK: torch.Tensor | None = None,
    *,
    asked: int = 1,
) -> torch.Tensor:
    """``[B, L]``, true where a position crosses.

    Args:
        real_BL: true for tokens, false for padding.
        tail: how many of a prompt's last positions cross; None: all. A row's prompt ends at its first position whose
            prediction is wanted: the one before the first label, or with no labels at all the first that is asked for.
        labels_BK: of the last positions, by transformers' convention (a position's label is its own token).
        targets_BK: instead of them, the token that each position should predict (transformers' ``shift_labels``).
        asked: last positions whose logits are wanted; more than 1 where drafts follow the prompt.
    """
    if tail is None:
        return real_BL
    place_BL = real_BL.cumsum(dim=1)  # 1 at a row's first token
    end_B1 = place_BL[:, -1:]
    if targets_BK is not None:
        end_B1 = _first(targets_BK != IGNORED, place_BL, end_B1)
    elif labels_BK is not None:
        end_B1 = _first((labels_BK != IGNORED)[:, 1:], place_BL[:, :-1], end_B1)
    else:
        end_B1 = place_BL[:, -asked:][:, :1]
    return real_BL & (place_BL > end_B1 - tail)


def wanted(
    real_BL: torch.Tensor, labels_BK: torch.Tensor | None, targets_BK: torch.Tensor | None
) -> torch.Tensor | None:
    """The token that each position should predict, ``[B, L]``, or ``IGNORED``; None if there are no labels."""
    if targets_BK is None:
        if labels_BK is None:
            return None
        targets_BK = torch.nn.functional.pad(labels_BK[:, 1:], (0, 1), value=IGNORED)
    missing = real_BL.shape[1] - targets_BK.shape[1]
    return torch.nn.functional.pad(targets_BK, (missing, 0), value=IGNORED)


def before_last(real_BL: torch.Tensor, crosses_BL: torch.Tensor) -> torch.Tensor:
    """``[B, L]``, true for each row's tokens up to the last that crosses."""
    return real_BL & (crosses_BL.flip(1).cumsum(dim=1).flip(1) > 0)


def _first(marked_BK: torch.Tensor, place_BL: torch.Tensor, otherwise_B1: torch.Tensor) -> torch.Tensor:
    """Place of each row's first marked position, ``[B, 1]``; marks are of the last positions."""
    places_BK = place_BL[:, place_BL.shape[1] - marked_BK.shape[1] :]
    found_BK = torch.where(marked_BK, places_BK, otherwise_B1)
    return torch.cat([found_BK, otherwise_B1], dim=1).min(dim=1, keepdim=True).values
