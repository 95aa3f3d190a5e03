"""Averted attention: sensitive tokens get less attention, so that less of them spreads into other positions.

With an aversion a_j ≥ 0 for key j, the logit of query i and key j is q_i·k_j/√d − a_j for i ≠ j. It is unchanged for
i = j, so a token always attends to itself in full. Without aversions a pass uses the family's plain attention, bit for
bit.

Shapes: B rows, H heads, Q new positions, K keys (the last Q are the new ones), P ≥ K positions so far, d width of a
head.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

AVERTED_ATTENTION = "isthmus_averted"
"""The name under which averted attention is registered with transformers."""


class Blocks(Protocol):
    """A part of the model, such as ``model.cut.Part``."""

    @property
    def config(self) -> Any: ...
    def hidden(self, **inputs: object) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class Aversion:
    """The arguments of averted attention in one pass."""

    own: str
    """Name of the part's own attention."""
    a_BP: torch.Tensor
    """Amount subtracted from the logits of each position's key."""


def averted_hidden(part: Blocks, a_BP: torch.Tensor | None, **inputs: object) -> torch.Tensor:
    """The part's hidden states, ``part.hidden(**inputs)``, with less attention to some positions.

    Args:
        a_BP: amount subtracted from the logits of each position's key, 0 at padding; None: plain attention.
    """
    if a_BP is None or not a_BP.any():
        return part.hidden(**inputs)
    AttentionInterface.register(AVERTED_ATTENTION, _attend)
    AttentionMaskInterface.register(AVERTED_ATTENTION, eager_mask)
    own: str = part.config._attn_implementation
    part.config._attn_implementation = AVERTED_ATTENTION
    try:
        return part.hidden(**inputs, aversion=Aversion(own, a_BP))
    finally:
        part.config._attn_implementation = own


def _attend(
    module: Any,
    query_BHQd: torch.Tensor,
    key_BHKd: torch.Tensor,
    value_BHKd: torch.Tensor,
    mask_B1QK: torch.Tensor,
    *,
    aversion: Aversion,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The family's attention with the aversions subtracted in its mask. A sliding window has dropped the oldest
    keys."""
    new, keys = query_BHQd.shape[2], key_BHKd.shape[2]
    a_BK = aversion.a_BP[:, -keys:].to(mask_B1QK)
    bias_BQK = -a_BK.unsqueeze(1).repeat(1, new, 1)
    places = torch.arange(new, device=a_BK.device)
    bias_BQK[:, places, keys - new + places] = 0.0
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(aversion.own, eager)
    return attention(  # type: ignore[no-any-return]
        module, query_BHQd, key_BHKd, value_BHKd, mask_B1QK + bias_BQK.unsqueeze(1), **settings
    )
