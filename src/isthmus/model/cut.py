"""The cut: the blocks of bottom, trunk and top, and loading one part without the others."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from isthmus.errors import CutError, ModelError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.device import CPU
from isthmus.model.families import Family, family_of

PartName = Literal["bottom", "trunk", "top"]


@dataclass(frozen=True)
class Cut:
    """The partition points: the silo has the first ``bottom`` and the last ``top`` blocks, the trunk the others."""

    bottom: int
    top: int

    def blocks(self, part: PartName, total: int) -> range:
        """Indices of this part's blocks in the uncut model.

        Args:
            total: number of blocks of the uncut model.

        Raises:
            CutError: bottom, trunk or top would have no block.
        """
        if self.bottom < 1 or self.top < 1 or self.bottom + self.top >= total:
            raise CutError(
                f"the cut ({self.bottom}, {self.top}) does not fit a model of {total} blocks",
                remedy=f"choose model.bottom ≥ 1 and model.top ≥ 1 with a sum of at most {total - 1}",
            )
        bounds = {
            "bottom": (0, self.bottom),
            "trunk": (self.bottom, total - self.top),
            "top": (total - self.top, total),
        }
        return range(*bounds[part])


class Part(nn.Module):
    """One part of the model: its family's Hugging Face model without the other parts' modules.

    Block indices start at 0 within the part, so that its KV cache has no unused layers. ``uncut_name`` converts a
    tensor's name to the one in the uncut model.

    Args:
        first_block: index, in the uncut model, of the part's first block.
    """

    def __init__(self, name: PartName, model: PreTrainedModel, family: Family, first_block: int) -> None:
        super().__init__()
        self.name = name
        self.model = model
        self.family = family
        self.first_block = first_block

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration with this part's number of blocks."""
        return self.model.config

    def uncut_name(self, name: str) -> str:
        """The name in the uncut model of the tensor or module ``name`` of ``self.model``."""
        prefix = self.family.block_prefix()
        if not name.startswith(prefix):
            return name
        number, dot, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{int(number) + self.first_block}{dot}{rest}"

    def hidden(self, **inputs: object) -> torch.Tensor:
        """The last hidden states, ``[batch, length, width]``; keyword arguments as for the family's backbone."""
        backbone = getattr(self.model, self.family.backbone)
        return backbone(**inputs).last_hidden_state  # type: ignore[no-any-return]


def load_part(
    checkpoint: Checkpoint,
    cut: Cut,
    name: PartName,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    tied: Part | None = None,
) -> Part:
    """Build one part, frozen and in eval mode. No other part's tensors are read from the checkpoint.

    Args:
        tied: bottom of the same silo; a top with tied weights shares its embedding.

    Raises:
        ModelError: the folder lacks a tensor, or one has an unexpected shape.
        CutError: the cut does not fit the model.
    """
    part = empty_part(checkpoint.config, cut, name)
    embedding, head = _ends_of(checkpoint, part, dtype)
    stored = {_embedding_name(part.family): embedding, f"{part.family.head}.weight": head}
    sources = {own: stored.get(part.uncut_name(own), part.uncut_name(own)) for own, _ in part.model.named_parameters()}
    check_leftovers(checkpoint, part, {*sources.values(), *stored})
    if tied is not None and embedding == head:
        del sources[f"{part.family.head}.weight"]
        part.model.get_submodule(part.family.head).weight = tied.model.get_parameter(_embedding_name(part.family))
    materialize_buffers(part.model)
    tensors = checkpoint.read(sorted(set(sources.values())))
    for own, source in sources.items():
        _check_shape(part, own, tensors[source], f"{source} in {checkpoint.folder}")
        _assign(part.model, own, tensors[source].to(device, dtype, copy=True))
    part.requires_grad_(False)
    return part.to(device).eval()


def empty_part(config: PreTrainedConfig, cut: Cut, name: PartName) -> Part:
    """A part on the ``meta`` device: shapes without memory."""
    family = family_of(config)
    blocks = cut.blocks(name, config.num_hidden_layers)
    own = copy.deepcopy(config)
    own.num_hidden_layers = len(blocks)
    own.tie_word_embeddings = False  # one part has no pair to tie; load_part shares the embedding
    if getattr(config, "layer_types", None) is not None:
        own.layer_types = [config.layer_types[number] for number in blocks]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(own)
    backbone = family.backbone_of(model)
    if name != "bottom":
        setattr(backbone, family.embedding, None)
    if name != "top":
        setattr(backbone, family.norm, nn.Identity())
        setattr(model, family.head, None)
    return Part(name, model, family, blocks.start)


def _embedding_name(family: Family) -> str:
    return f"{family.backbone}.{family.embedding}.weight"


def _ends_of(checkpoint: Checkpoint, part: Part, dtype: torch.dtype) -> tuple[str, str]:
    """The checkpoint's names of embedding and head, one name if they are tied.

    As transformers: where the configuration ties them but both are stored and differ, they stay apart; where one alone
    is stored, it is both. No part but top reads them to find out.
    """
    embedding, head = _embedding_name(part.family), f"{part.family.head}.weight"
    if not checkpoint.config.tie_word_embeddings:
        return embedding, head
    both = [name for name in (embedding, head) if name in checkpoint.weights]
    if len(both) == 2 and part.name == "top":
        first, second = (tensor.to(dtype) for tensor in checkpoint.read(both).values())
        if not torch.equal(first, second):
            return embedding, head
    return (both[0], both[0]) if both else (embedding, embedding)


def check_leftovers(checkpoint: Checkpoint, part: Part, used: Collection[str]) -> None:
    """Refuse a checkpoint with tensors that belong to this part but not to its family's model.

    Args:
        used: the stored weights that the part takes.

    Raises:
        ModelError: there are such tensors.
    """
    model, family = part.model, part.family
    prefixes = [
        part.uncut_name(f"{family.block_prefix()}{number}.") for number in range(model.config.num_hidden_layers)
    ]
    if part.name == "bottom":
        prefixes.append(f"{family.backbone}.{family.embedding}.")
    if part.name == "top":
        prefixes += [f"{family.backbone}.{family.norm}.", f"{family.head}."]
    harmless = {r"rotary_emb\.inv_freq", *(model._keys_to_ignore_on_load_unexpected or ())}
    checkpoint.check_leftovers(tuple(prefixes), used, harmless)


def _check_shape(part: Part, own: str, tensor: torch.Tensor, place: str) -> None:
    expected = tuple(part.model.get_parameter(own).shape)
    if tuple(tensor.shape) != expected:
        raise ModelError(
            f"{place} has shape {tuple(tensor.shape)}, config.json requires {expected}",
            remedy="give model.path a folder whose config.json belongs to its weights",
        )


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


@torch.no_grad()
def materialize_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that checkpoints lack (rotary frequencies, embedding scales) with the family's own code."""
    for module in model.modules():
        on_meta = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in on_meta.items():
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
        if on_meta:
            model._init_weights(module)  # parameters are still on meta: only the buffers get values
