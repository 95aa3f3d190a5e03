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
            layer.forward = partial(_forward, layer, part.whole_name(name), groups)
    return groups


def _forward(layer: Linear, name: str, groups: Groups, x_1TD: torch.Tensor) -> torch.Tensor:
    """The layer's base result and each stretch's own change, in peft's order of operations."""
    base: torch.Tensor = layer.base_layer(x_1TD)
    if groups.stretches is None:
        change = _change(layer, x_1TD, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    else:
        pieces = torch.split(x_1TD, [tokens for tokens, _ in groups.stretches], dim=1)
        keys = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        changes = [
            _change(layer, piece, *(adapter[key] for key in keys))
            for piece, (_, adapter) in zip(pieces, groups.stretches, strict=True)
        ]
        change = torch.cat(changes, dim=1)
    return (base + change).to(base.dtype)


def _change(layer: Linear, x_1TD: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    change: torch.Tensor = linear(linear(x_1TD.to(a.dtype), a), b) * layer.scaling["default"]
    return change
