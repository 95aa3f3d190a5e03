"""Grouped LoRA: in one packed pass, each stretch of tokens goes through an adapter of its own over one base weight.

Shapes: T tokens of all stretches, D width, S stretches, N tokens of the longest, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.lora import Linear
from torch.nn.functional import linear

from isthmus.model.cut import Part
from isthmus.model.packing import Padding

Adapter = Mapping[str, torch.Tensor]
"""LoRA tensors by uncut name."""


class Groups:
    """Which adapter each stretch of the pass under way goes through; all layers of a part look here.

    Args:
        at_once: compute all stretches of a layer in one batched product, as accelerators want it.
    """

    def __init__(self, *, at_once: bool) -> None:
        self._at_once = at_once
        self.stretches: list[tuple[int, Adapter]] | None = None
        """Tokens and adapter, in the order of the tokens; None: the part's own adapter for all."""
        self.padding: Padding | None = None
        """The stretches as a batch; None: they are computed one by one."""

    @contextmanager
    def through(self, stretches: list[tuple[int, Adapter]] | None, device: torch.device) -> Iterator[None]:
        """Send the passes of this block through these adapters."""
        self.stretches = stretches
        if self._at_once and stretches is not None and len(stretches) > 1:
            self.padding = Padding([tokens for tokens, _ in stretches], device)
        try:
            yield
        finally:
            self.stretches = self.padding = None


def group_adapters(part: Part, *, at_once: bool = False) -> Groups:
    """Have the part's LoRA layers heed what ``through`` says at each pass."""
    groups = Groups(at_once=at_once)
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
        keys = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        pairs = [(adapter[keys[0]], adapter[keys[1]]) for _, adapter in groups.stretches]
        if groups.padding is not None:
            change = _changes_at_once(layer, x_1TD, pairs, groups.padding)
        else:
            pieces = torch.split(x_1TD, [tokens for tokens, _ in groups.stretches], dim=1)
            changes = [_change(layer, piece, a, b) for piece, (a, b) in zip(pieces, pairs, strict=True)]
            change = torch.cat(changes, dim=1)
    return (base + change).to(base.dtype)


def _change(layer: Linear, x_1TD: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    change: torch.Tensor = linear(linear(x_1TD.to(a.dtype), a), b) * layer.scaling["default"]
    return change


def _changes_at_once(
    layer: Linear, x_1TD: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]], padding: Padding
) -> torch.Tensor:
    a_SRD, b_SDR = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    x_SND = padding.pad(x_1TD[0], dim=0).to(a_SRD.dtype)
    change_SND: torch.Tensor = x_SND @ a_SRD.mT @ b_SDR.mT * layer.scaling["default"]
    return padding.unpad(change_SND, dim=0).unsqueeze(0)
