"""Grouped LoRA: one packed pass whose segments of tokens go through different adapters over the same base weights.

Dropout masks are drawn from a key of the segment and the layer's name, not from a running generator: a pass that is
computed again, alone or together with others, has the same masks.

Shapes: T tokens of all segments, D width, S segments, N tokens of the longest segment, R rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.lora import Linear
from torch.nn.functional import linear

from isthmus.model.cut import Part
from isthmus.model.packing import Padding

Adapter = Mapping[str, torch.Tensor]
"""LoRA tensors by their name in the uncut model."""


class AdapterGroups:
    """The segments of the current pass and the adapter of each; all LoRA layers of a part read it.

    Args:
        at_once: compute all segments of a layer in one batched product, which is faster on accelerators.
    """

    def __init__(self, *, at_once: bool) -> None:
        self._at_once = at_once
        self.segments: list[tuple[int, Adapter]] | None = None
        """Number of tokens and adapter of each segment, in order; None: the part's own adapter for all tokens."""
        self.padding: Padding | None = None
        """Padding of the segments to a batch; None: they are computed one by one."""
        self._keys: Sequence[str | None] = ()
        """The key of each segment's dropout masks; None: nothing is left out."""

    @contextmanager
    def through(
        self,
        segments: list[tuple[int, Adapter]] | None,
        device: torch.device,
        keys: Sequence[str | None] = (),
    ) -> Iterator[None]:
        """Use these segments for the passes within the ``with`` block.

        Args:
            keys: of each segment's dropout masks; None: nothing of it is left out.
        """
        self.segments, self._keys = segments, keys
        if self._at_once and segments is not None and len(segments) > 1:
            self.padding = Padding([tokens for tokens, _ in segments], device)
        try:
            yield
        finally:
            self.segments = self.padding = None
            self._keys = ()

    def dropped(self, layer: Linear, name: str, x_1TD: torch.Tensor) -> torch.Tensor:
        """A layer's input with the dropout of the current segments.

        Args:
            name: the layer's, in the uncut model.
        """
        chance = getattr(layer.lora_dropout["default"], "p", 0.0)
        if not chance or self.segments is None or not any(self._keys):
            return x_1TD
        sizes = [tokens for tokens, _ in self.segments]
        pieces = [
            dropout_mask(None if key is None else f"{key}/{name}", (tokens, x_1TD.shape[-1]), chance, x_1TD.device)
            for tokens, key in zip(sizes, self._keys, strict=True)
        ]
        return x_1TD * torch.cat(pieces)


def dropout_mask(key: str | None, shape: tuple[int, int], chance: float, device: torch.device) -> torch.Tensor:
    """The factors of dropout, fp32: 0 by this chance, else 1 / (1 - chance). They depend on nothing but the arguments.

    Args:
        key: None: all factors are 1.
    """
    mask_TD = torch.ones(shape, device=device)
    if key is None:
        return mask_TD
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return mask_TD.bernoulli_(1 - chance, generator=generator).div_(1 - chance)


def group_adapters(part: Part, *, at_once: bool = False) -> AdapterGroups:
    """Replace the forward of the part's LoRA layers by one that reads the returned groups at each pass."""
    groups = AdapterGroups(at_once=at_once)
    for name, layer in part.model.named_modules():
        if isinstance(layer, Linear):
            layer.forward = partial(_forward, layer, part.uncut_name(name), groups)
    return groups


def _forward(layer: Linear, name: str, groups: AdapterGroups, x_1TD: torch.Tensor) -> torch.Tensor:
    """The layer's base result plus each segment's LoRA change, in peft's order of operations. Mixtures of experts drop
    the first dimension of ``x_1TD``."""
    base: torch.Tensor = layer.base_layer(x_1TD)
    x_1TD = groups.dropped(layer, name, x_1TD)
    if groups.segments is None:
        change = _change(layer, x_1TD, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    else:
        keys = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        pairs = [(adapter[keys[0]], adapter[keys[1]]) for _, adapter in groups.segments]
        if groups.padding is not None:
            change = _changes_at_once(layer, x_1TD, pairs, groups.padding)
        else:
            pieces = torch.split(x_1TD, [tokens for tokens, _ in groups.segments], dim=-2)
            changes = [_change(layer, piece, a, b) for piece, (a, b) in zip(pieces, pairs, strict=True)]
            change = torch.cat(changes, dim=-2)
    return (base + change).to(base.dtype)


def _change(layer: Linear, x_1TD: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    change: torch.Tensor = linear(linear(x_1TD.to(a.dtype), a), b) * layer.scaling["default"]
    return change


def _changes_at_once(
    layer: Linear, x_1TD: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]], padding: Padding
) -> torch.Tensor:
    a_SRD, b_SDR = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    x_SND = padding.pad(x_1TD.flatten(0, -2), dim=0).to(a_SRD.dtype)
    change_SND: torch.Tensor = x_SND @ a_SRD.mT @ b_SDR.mT * layer.scaling["default"]
    return padding.unpad(change_SND, dim=0).view(*x_1TD.shape[:-1], -1)
