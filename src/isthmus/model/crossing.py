"""A batch on its way to the trunk and back: the positions that cross, the state that the silo keeps, and the answer.

Shapes: B rows, L new positions, K the last positions (those that labels are given for), T positions that cross (row
after row), D the model's width, W the width that crosses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from isthmus.model.cache import SplitCache
from isthmus.model.packing import Packing
from isthmus.privacy.subjects import Subjects

IGNORED = -100
"""Label of a position without loss, as in transformers."""


@dataclass(frozen=True)
class FreshExample:
    """A sequence whose hidden states were not released before, in a silo that releases each example once."""

    number: int
    """The identifier under which the trunk stores the hidden states (see ``silo.released.Released``)."""
    h_LW: torch.Tensor
    """Hidden states of the positions that cross."""
    subjects: Subjects
    """The record that the sequence belongs to."""


@dataclass(frozen=True)
class Outbound:
    """A batch on its way to the trunk, made by ``SplitForCausalLM.outbound``, which decides everything that crosses.

    A trunk reads the fields up to ``fresh``. The others stay in the silo until the answer arrives.
    """

    lengths: list[int]
    """Number of positions of each sequence that cross."""
    h_TW: torch.Tensor | None
    """Hidden states to send: bottom's output, projected if there is a bottleneck, already clipped if it has a gradient.
    None if bottom did not run, since all ``examples`` were released before."""
    subjects: Subjects | None = None
    """The records that the sequences belong to; None where nothing leaves the silo (a draft)."""
    examples: list[int] | None = None
    """The sequences' identifiers, sent in place of ``h_TW`` if each example is released once; otherwise None."""
    fresh: list[FreshExample] = field(default_factory=list)
    """The examples that were not released before."""
    cache: SplitCache | None = None
    """The generation's KV cache; None: each sequence starts at position 0."""
    packing: Packing | None = None
    """Packing of the positions that cross."""
    h_BLD: torch.Tensor | None = None
    """Bottom's output at all new positions."""
    like: torch.Tensor | None = None
    """A tensor with the device and dtype for the trunk's answer; None: those of ``h_TW``."""
    supervised: int | None = None
    """Number of tokens in the loss that the model computes; None if it computes none."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments that bottom and top have in common: mask, position ids, ``use_cache``."""


class Reply(NamedTuple):
    """The trunk's answer to an ``Outbound``."""

    g_TD: torch.Tensor
    """The trunk's output, differentiable if gradients are enabled and there is no cache."""
    noise_TW: torch.Tensor | None = None
    """The noise and rounding error in the hidden states that crossed; None unless the bottleneck denoises."""


def crossing_positions(
    real_BL: torch.Tensor,
    tail: int | None,
    labels_BK: torch.Tensor | None = None,
    targets_BK: torch.Tensor | None = None,
    *,
    scored: int = 1,
) -> torch.Tensor:
    """Mask of the positions that cross, ``[B, L]`` bool.

    Args:
        real_BL: true for tokens, false for padding.
        tail: number of a prompt's last positions that cross; None: all. A row's prompt ends at its first scored
            position: the one before the first label, or without labels the first of the last ``scored``.
        labels_BK: labels of the last positions, by transformers' convention (a position's label is its own token).
        targets_BK: in place of labels, the token that each position should predict (transformers' ``shift_labels``).
        scored: without labels, the number of last positions whose logits are needed; over 1 if drafted tokens follow
            the prompt.
    """
    if tail is None:
        return real_BL
    ordinal_BL = real_BL.cumsum(dim=1)  # 1 at a row's first token
    end_B1 = ordinal_BL[:, -1:]
    if targets_BK is not None:
        end_B1 = _first(targets_BK != IGNORED, ordinal_BL, end_B1)
    elif labels_BK is not None:
        end_B1 = _first((labels_BK != IGNORED)[:, 1:], ordinal_BL[:, :-1], end_B1)
    else:
        end_B1 = ordinal_BL[:, -scored:][:, :1]
    return real_BL & (ordinal_BL > end_B1 - tail)


def prediction_targets(
    real_BL: torch.Tensor, labels_BK: torch.Tensor | None, targets_BK: torch.Tensor | None
) -> torch.Tensor | None:
    """The token that each position should predict, or ``IGNORED``, ``[B, L]``; None without labels and targets.

    Args:
        labels_BK, targets_BK: as in ``crossing_positions``.
    """
    if targets_BK is None:
        if labels_BK is None:
            return None
        targets_BK = torch.nn.functional.pad(labels_BK[:, 1:], (0, 1), value=IGNORED)
    missing = real_BL.shape[1] - targets_BK.shape[1]
    return torch.nn.functional.pad(targets_BK, (missing, 0), value=IGNORED)


def count_supervised(labels_BK: torch.Tensor | None, targets_BK: torch.Tensor | None) -> int | None:
    """Number of tokens in the loss; None without labels and targets, which are as in ``crossing_positions``."""
    if targets_BK is None:
        if labels_BK is None:
            return None
        targets_BK = labels_BK[:, 1:]
    return int((targets_BK != IGNORED).sum())


def up_to_last_crossing(real_BL: torch.Tensor, crosses_BL: torch.Tensor) -> torch.Tensor:
    """Mask of each row's tokens up to the last one that crosses, ``[B, L]`` bool."""
    return real_BL & (crosses_BL.flip(1).cumsum(dim=1).flip(1) > 0)


def _first(marked_BK: torch.Tensor, ordinal_BL: torch.Tensor, otherwise_B1: torch.Tensor) -> torch.Tensor:
    """Ordinal, from 1, of each row's first marked token, ``[B, 1]``; ``otherwise_B1`` where none is marked."""
    ordinals_BK = ordinal_BL[:, ordinal_BL.shape[1] - marked_BK.shape[1] :]
    found_BK = torch.where(marked_BK, ordinals_BK, otherwise_B1)
    return torch.cat([found_BK, otherwise_B1], dim=1).min(dim=1, keepdim=True).values
