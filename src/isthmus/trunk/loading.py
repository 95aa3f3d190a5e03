"""The trunk's part of the model as a recipe has it: its weights' kind, its adapters, and the blocks of this process."""

from __future__ import annotations

import torch

from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part
from isthmus.model.device import CPU
from isthmus.model.rounded_linear import check_machine, round_weights
from isthmus.model.share import BlockShare
from isthmus.recipe import Recipe


def load_trunk(
    checkpoint: Checkpoint, cut: Cut, recipe: Recipe, device: torch.device, share: BlockShare | None = None
) -> Part:
    """The trunk's part with its adapters, as the recipe has them.

    Args:
        share: of the blocks, that this process computes; None: all.

    Raises:
        CutError, ModelError: see ``load_part``.
        NotSupportedError: there are more ranks than blocks, or the recipe's kind of weights is not for this device.
    """
    dtype, weights = getattr(torch, recipe.trunk.dtype or recipe.model.dtype), recipe.trunk.weights
    if weights is not None:
        check_machine(weights, device)
    blocks = None
    if share is not None:
        blocks = share.blocks(len(cut.blocks("trunk", checkpoint.config.get_text_config().num_hidden_layers)))
    first = device if weights is None else CPU
    part = load_part(checkpoint, cut, "trunk", dtype=dtype, device=first, blocks=blocks)
    layers = [name for name in part.plain_layers() if blocks is None or part.own_block(name) in blocks]
    adapters.add_trained_layers(part, recipe)
    if weights is not None:
        round_weights(part, layers, weights, device)
    return part
