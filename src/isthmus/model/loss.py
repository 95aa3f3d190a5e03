"""The loss of a causal model without all its logits: of positions with a label alone, some of them at a time.

Logits are a silo's largest tensors: those of 4 rows of 1,024 tokens and a vocabulary of 152,000 take 2.5 GB, and as
much again for their loss and for their gradient. Here the gradient of a piece's hidden states is computed with its
loss, so that no logits are kept, and none are computed twice.

Shapes: B rows, K the last positions, T those of them with a label, D the model's width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from isthmus.model.crossing import IGNORED
from isthmus.model.cut import Part
from isthmus.model.recompute import hidden_recomputed

LOGITS_AT_ONCE = 2**24
"""Most logits at a time: 64 MiB in fp32. Their gradient takes their place. Much smaller pieces are slower: the head's
weights are read for each."""
FEW = 2**20
"""As many logits (4 MiB in fp32) are not worth the trouble: the family's own forward computes them and the loss."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""Gives logits ``[1, T, V]`` of hidden states ``[1, T, D]``, each position's of its own alone."""


def loss_and_logits(
    top: Part, inputs: dict[str, Any], head: dict[str, Any], *, recompute: bool = False
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What top makes of the trunk's answer: a loss if there are labels, and logits unless they are not wanted.

    Args:
        inputs: arguments of top's backbone.
        head: ``labels``, ``logits_to_keep`` and other arguments of the loss, as of transformers' causal models, and
            ``skip_logits``: whether the loss is wanted alone, which needs labels.
        recompute: compute top's activations again in the backward, if the loss is wanted alone and there is no cache.
    """
    given = {name: value for name, value in head.items() if name != "skip_logits"}
    if not head.get("skip_logits"):
        output = top.model(**inputs, **given)
        return output.loss, output.logits
    targets_BK, keep = given.get("shift_labels"), given.get("logits_to_keep", 0)
    if targets_BK is None:
        targets_BK = nn.functional.pad(given["labels"][:, 1:], (0, 1), value=IGNORED)
    vocabulary = top.config.get_text_config().vocab_size
    if targets_BK.numel() * vocabulary <= FEW:
        return top.model(**inputs, **given).loss, None
    again = recompute and torch.is_grad_enabled() and inputs.get("past_key_values") is None
    h_BLD = hidden_recomputed(top, inputs) if again else top.hidden(**inputs)
    h_BKD = h_BLD[:, slice(-keep, None) if isinstance(keep, int) else keep]
    divisor = given.get("num_items_in_batch")
    parameters = top.head.parameters()
    return loss_in_pieces(top.logits, parameters, h_BKD, targets_BK, vocabulary=vocabulary, divisor=divisor), None


def loss_in_pieces(
    head: Head,
    parameters: Iterable[nn.Parameter],
    h_BKD: torch.Tensor,
    targets_BK: torch.Tensor,
    *,
    vocabulary: int,
    divisor: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """The cross entropy that transformers' causal models compute, in nats, a scalar of fp32, within rounding.

    Its gradient goes to the hidden states and to the head's parameters. Without any label the mean is NaN, as there.

    Args:
        parameters: the head's.
        targets_BK: the token that each position should predict, or ``IGNORED``.
        vocabulary: V.
        divisor: what the sum over the labels is divided by (transformers' ``num_items_in_batch``); None: their number.
    """
    supervised_BK = targets_BK != IGNORED
    h_TD, targets_T = h_BKD[supervised_BK], targets_BK[supervised_BK]
    weight = len(targets_T) if divisor is None else divisor
    trained = [one for one in parameters if one.requires_grad]
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    return _LossInPieces.apply(h_TD, targets_T, weight, head, size, *trained)  # type: ignore[no-untyped-call,no-any-return]


class _LossInPieces(torch.autograd.Function):
    """The loss. Its gradient is computed in the forward, while a piece's logits are there; the backward scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        h_TD: torch.Tensor,
        targets_T: torch.Tensor,
        weight: torch.Tensor | float,
        head: Head,
        size: int,
        *trained: nn.Parameter,
    ) -> torch.Tensor:
        differentiable = any(ctx.needs_input_grad)
        total = torch.zeros((), device=h_TD.device)
        gradients_TD, sums = [], [torch.zeros_like(one) for one in trained]
        for start in range(0, max(1, len(h_TD)), size):
            h_PD, targets_P = h_TD[start : start + size], targets_T[start : start + size]
            with torch.set_grad_enabled(differentiable):
                h_PD = h_PD.detach().requires_grad_(differentiable)
                logits_1PV = head(h_PD[None])
            loss, gradient_PV = _loss_and_gradient(logits_1PV.detach()[0], targets_P, weight)
            total += loss
            if differentiable:
                gradient_PD, *gradients = torch.autograd.grad(logits_1PV, (h_PD, *trained), gradient_PV[None])
                gradients_TD.append(gradient_PD)
                for own, gradient in zip(sums, gradients, strict=True):
                    own += gradient
        if differentiable:
            ctx.save_for_backward(torch.cat(gradients_TD), *sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient_TD, *gradients = (one * scale for one in ctx.saved_tensors)
        return gradient_TD, None, None, None, None, *gradients


def _loss_and_gradient(
    logits_PV: torch.Tensor, targets_P: torch.Tensor, weight: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the cross entropies divided by ``weight``, and its gradient, in the logits' own memory if they are
    fp32: their softmax, less one at each target."""
    soft_PV, targets_P1 = logits_PV.float(), targets_P[:, None]
    soft_PV -= soft_PV.amax(dim=-1, keepdim=True)
    picked_P1 = soft_PV.gather(1, targets_P1)
    total_P1 = soft_PV.exp_().sum(dim=-1, keepdim=True)
    soft_PV /= total_P1 * weight
    soft_PV.scatter_add_(1, targets_P1, -torch.ones_like(picked_P1) / weight)
    return (total_P1.log() - picked_P1).sum() / weight, soft_PV.to(logits_PV.dtype)
