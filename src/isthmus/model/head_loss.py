"""The loss of a model's head in pieces, so that the logits of all positions are never in memory at once.

Logits are the largest tensors of a silo: 4 rows of 1,024 tokens and 152,000 words are 2.5 GB, several times over with
their gradient. Each piece's gradient is computed while its logits are there, and kept in its place: as large as the
hidden states (Liger kernel, Hsu et al. 2024, and Cut Your Losses, Wijmans et al. 2024, do so in one kernel of a GPU).

Shapes: B rows, K positions, N positions with a target, D the model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import MoeModelOutputWithPast

from isthmus.model.crossing import IGNORED
from isthmus.model.cut import Part, shallow

PIECE = 2**21
"""Logits of a piece: 8 MB in fp32, of which a step has some four copies at a time."""


class HeadLoss:
    """The cross-entropy that a family's causal language model computes from the hidden states before its head.

    Args:
        top: the part with the head. All that the family does to logits is done, since its own forward runs.
        piece: about the number of logits that are in memory at a time.
    """

    def __init__(self, top: Part, piece: int = PIECE) -> None:
        self._top, self._piece = top, piece
        self._words: int = top.config.get_text_config().vocab_size

    def __call__(
        self, h_BKD: torch.Tensor, targets_BK: torch.Tensor, items: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The mean over the positions with a target, or the sum divided by ``items``.

        Args:
            targets_BK: the token that follows each position, or ``IGNORED``.
        """
        with_target_BK = targets_BK != IGNORED
        h_ND, targets_N = h_BKD[with_target_BK], targets_BK[with_target_BK]
        trained = [one for one in self._head().parameters() if one.requires_grad]
        total = _InPieces.apply(self, targets_N, h_ND, *trained)  # type: ignore[no-untyped-call]
        return total / (len(targets_N) if items is None else items)  # type: ignore[no-any-return]

    def is_small(self, targets_BK: torch.Tensor) -> bool:
        """Whether the logits of all positions are no more than one piece's."""
        return targets_BK.numel() * self._words <= self._piece

    def pieces(self, h_ND: torch.Tensor, targets_N: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Hidden states and targets of so many positions as have about ``piece`` logits."""
        size = max(1, self._piece // self._words)
        return list(zip(h_ND.split(size), targets_N.split(size), strict=True))  # type: ignore[no-untyped-call]

    def logits(self, h_BKD: torch.Tensor) -> torch.Tensor:
        """All that the family computes from these hidden states, ``[B, K, V]``."""
        logits: torch.Tensor = self._model_of(h_BKD)(inputs_embeds=h_BKD, use_cache=False).logits
        return logits

    def summed(self, h_PD: torch.Tensor, targets_P: torch.Tensor) -> torch.Tensor:
        """The loss of a piece, summed over its positions."""
        h_1PD, targets_1P = h_PD.unsqueeze(0), targets_P.unsqueeze(0)
        loss: torch.Tensor = self._model_of(h_1PD)(
            inputs_embeds=h_1PD, labels=targets_1P, shift_labels=targets_1P, num_items_in_batch=1, use_cache=False
        ).loss
        return loss

    def _model_of(self, h_BLD: torch.Tensor) -> Any:
        """Top's model with a backbone that gives these hidden states."""
        twin = shallow(self._top.model)
        setattr(twin, self._top.family.backbone, _Given(h_BLD))
        return twin

    def _head(self) -> nn.Module:
        head: nn.Module = self._top.model.get_submodule(self._top.family.head)
        return head


class _Given(nn.Module):
    """A backbone whose last hidden states are given."""

    def __init__(self, h_BLD: torch.Tensor) -> None:
        super().__init__()
        self._h_BLD = h_BLD

    def forward(self, **_: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self._h_BLD)


class _InPieces(torch.autograd.Function):
    """The summed loss; its gradients are computed with it, a piece at a time."""

    @staticmethod
    def forward(
        ctx: Any, loss: HeadLoss, targets_N: torch.Tensor, h_ND: torch.Tensor, *trained: torch.Tensor
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[2:]
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        inputs, start = (h_ND, *trained), 0
        ctx.found = [torch.zeros_like(one) if wants else None for one, wants in zip(inputs, wanted, strict=True)]
        for h_PD, targets_P in loss.pieces(h_ND, targets_N):
            with torch.set_grad_enabled(any(wanted)):
                h_PD = h_PD.detach().requires_grad_(wanted[0])
                summed = loss.summed(h_PD, targets_P)
            total += summed.detach()
            _add(ctx.found, _gradients(summed, (h_PD, *trained), wanted), start)
            start += len(h_PD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(None if one is None else one * gradient for one in ctx.found)


def _gradients(
    summed: torch.Tensor, inputs: Sequence[torch.Tensor], wanted: Sequence[bool]
) -> list[torch.Tensor | None]:
    chosen = [one for one, wants in zip(inputs, wanted, strict=True) if wants]
    if not chosen:
        return [None] * len(wanted)
    given = iter(torch.autograd.grad(summed, chosen, allow_unused=True))
    return [next(given) if wants else None for wants in wanted]


def _add(found: Sequence[torch.Tensor | None], new: Sequence[torch.Tensor | None], start: int) -> None:
    """Put the gradient of a piece's hidden states in its place, and add those of parameters."""
    for number, (whole, one) in enumerate(zip(found, new, strict=True)):
        if whole is None or one is None:
            continue
        if number == 0:
            whole[start : start + len(one)] = one
        else:
            whole += one
