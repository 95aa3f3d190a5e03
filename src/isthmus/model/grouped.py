"""Grouped LoRA: in one packed pass, each stretch of tokens goes through an adapter of its own over one base weight.

Shapes: T tokens of all stretches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from peft.tuners.lora import Linear
from torch.nn.functional import linear

from isthmus.model.cut import Part

Adapter = Mapping[str, torch.Tensor]
"""LoRA tensors by uncut name."""


class Groups:
    """Which adapter each stretch of the pass under way goes through; all layers of a part look here."""

    def __init__(self) -> None:
        self.stretches: list[tuple[int, Adapter]] | None = None
        """Tokens and adapter, in the order of the tokens; None: the part's own adapter for all."""


def group_adapters(part: Part) -> Groups:
    """Have the part's LoRA layers heed what ``stretches`` says at each pass."""
    groups = Groups()
    for name, layer in part.model.named_modules():
        if isinstance(layer, Linear):
            layer.forward = partial(_forward, layer, layer.forward, part.whole_name(name), groups)
    return groups


def _forward(layer: Linear, plain, name: str, groups: Groups, x_1TD: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The layer's base result and each stretch's own change, in peft's order of operations."""
    if groups.stretches is None:
        return plain(x_1TD)  # type: ignore[no-any-return]
    base: torch.Tensor = layer.base_layer(x_1TD)
    scaling = layer.scaling["default"]
    pieces = torch.split(x_1TD, [tokens for tokens, _ in groups.stretches], dim=1)
    changes = []
    for piece, (_, adapter) in zip(pieces, groups.stretches, strict=True):
        a, b = adapter[f"{name}.lora_A.weight"], adapter[f"{name}.lora_B.weight"]
        changes.append(linear(linear(piece.to(a.dtype), a), b) * scaling)
    return (base + torch.cat(changes, dim=1)).to(base.dtype)
