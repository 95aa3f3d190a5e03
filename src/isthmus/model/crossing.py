"""Which positions of a batch cross to the trunk: no padding, and at most a tail of each prompt.

Shapes: B rows, L new positions, K of them (the last) with a label or without.
"""

from __future__ import annotations

import torch

IGNORED = -100
"""Label of a position without loss, as in transformers."""


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
        targets_BK: instead of them, what each position should predict (transformers' ``shift_labels``).
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
    """What each position should predict, ``[B, L]``, ``IGNORED`` where nothing is said; None if there are no labels."""
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
