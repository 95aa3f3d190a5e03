"""The cut: the blocks of bottom, trunk and top, and loading one part without the others."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.modeling_outputs import MoeModelOutputWithPast

from isthmus.errors import CutError, ModelError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.device import CPU
from isthmus.model.families import Family, family_of, uncut_shapes
from isthmus.model.rope import install
from isthmus.model.stored import StoredTensors

PartName = Literal["bottom", "trunk", "top"]
PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Settings with a value for each block. Blocks are built from the uncut model's; forwards read a part's."""


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

    def passed(self, own: Cut, total: int) -> range:
        """Indices in this cut's trunk of the blocks that a silo with a cut of its own passes there.

        Raises:
            CutError: no block would be left to pass.
        """
        blocks = own.blocks("trunk", total)
        return range(blocks.start - self.bottom, blocks.stop - self.bottom)


class Part(nn.Module):
    """One part of the model: its family's Hugging Face model without the other parts' modules.

    Block indices start at 0 within the part, so that its KV cache has no unused layers. ``uncut_name`` converts a
    tensor's name to the one in the uncut model.

    Args:
        first_block: index, in the uncut model, of the part's first block.
        whole: the uncut model's configuration; None: the model is uncut itself.
    """

    def __init__(
        self,
        name: PartName,
        model: PreTrainedModel,
        family: Family,
        first_block: int,
        whole: PreTrainedConfig | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model
        self.family = family
        self.first_block = first_block
        self.whole: PreTrainedConfig = model.config if whole is None else whole
        self.here: range | None = None
        """The blocks that compute in this process, by their indices in the part; None: all."""

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration with this part's number of blocks."""
        return self.model.config

    def uncut_name(self, name: str) -> str:
        """The name in the uncut model of the tensor or module ``name`` of ``self.model``."""
        own, blocks = f"{self.family.backbone}.", self.family.block_prefix()
        if name.startswith(blocks):
            number, dot, rest = name.removeprefix(blocks).partition(".")
            name = f"{blocks}{int(number) + self.first_block}{dot}{rest}"
        return self.family.uncut_prefix() + name.removeprefix(own) if name.startswith(own) else name

    def own_block(self, name: str) -> int | None:
        """Index in the part of the block that a tensor of this name in ``self.model`` is of; None: of no block."""
        blocks = self.family.block_prefix()
        return int(name.removeprefix(blocks).partition(".")[0]) if name.startswith(blocks) else None

    def plain_layers(self) -> dict[str, nn.Linear]:
        """The plain linear layers of its blocks by their names in the part, in order. Call it before adapters are
        added, whose factors are linear layers, too."""
        found = self.model.named_modules()
        blocks = self.family.block_prefix()
        return {name: one for name, one in found if name.startswith(blocks) and _is_plain(one)}

    def replace_layer(self, name: str, make: Callable[[nn.Linear], nn.Module]) -> None:
        """Put what is made of one of ``plain_layers`` in its place. An adapter that it has by now stays on it."""
        owner, own = self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        layer = getattr(owner, own)
        if hasattr(layer, "base_layer"):
            owner, own, layer = layer, "base_layer", layer.base_layer
        setattr(owner, own, make(layer))

    def stretch(self, blocks: range) -> Part:
        """These blocks alone, by their indices in this part, as a part that shares all modules with it.

        A block keeps its index in this part: masks and caches are those of the whole part.
        """
        model, backbone = _shallow(self.model), _shallow(self.family.backbone_of(self.model))
        backbone.config = copy.copy(backbone.config)
        backbone.config.num_hidden_layers = len(blocks)
        for setting in PER_BLOCK:
            values = getattr(backbone.config, setting, None)
            if values is not None:
                vars(backbone.config)[setting] = [values[number] for number in blocks]
        own = getattr(backbone, self.family.blocks)
        setattr(backbone, self.family.blocks, nn.ModuleList([own.get_submodule(str(number)) for number in blocks]))
        setattr(model, self.family.backbone, backbone)
        return Part(self.name, model, self.family, self.first_block + blocks.start, self.whole)

    def hidden(self, **inputs: object) -> torch.Tensor:
        """The last hidden states, ``[batch, length, width]``; keyword arguments as for the family's backbone."""
        backbone = getattr(self.model, self.family.backbone)
        return backbone(**inputs).last_hidden_state  # type: ignore[no-any-return]

    @property
    def head(self) -> nn.Module:
        """The head of the top, with the adapter that it may have."""
        head: nn.Module = self.model.get_submodule(self.family.head)
        return head

    def logits(self, h_BLD: torch.Tensor) -> torch.Tensor:
        """The logits ``[batch, length, vocabulary]`` of ``hidden``'s hidden states, by the family's own code: with the
        scale or the cap that some families have behind the head."""
        model = _shallow(self.model)
        setattr(model, self.family.backbone, _Given())
        return model(inputs_embeds=h_BLD, use_cache=False).logits  # type: ignore[no-any-return]


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear


class _Given(nn.Module):
    """In a backbone's place: what it would compute is given."""

    def forward(self, inputs_embeds: torch.Tensor, **_: object) -> MoeModelOutputWithPast:
        """The last hidden states."""
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def _shallow(module: Any) -> Any:
    """A module with the same submodules and tensors, of which single ones can be replaced."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


def load_part(
    checkpoint: Checkpoint,
    cut: Cut,
    name: PartName,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    tied: Part | None = None,
    blocks: range | None = None,
) -> Part:
    """Build one part, frozen and in eval mode. No other part's tensors are read from the checkpoint.

    Args:
        tied: bottom of the same silo; a top with tied weights shares its embedding.
        blocks: those of the part's blocks, by their indices in it, that are to compute here; the others' weights are
            zeros that take no memory. None: all.

    Raises:
        ModelError: the folder lacks a tensor, or one has an unexpected shape.
        CutError: the cut does not fit the model.
    """
    part = empty_part(checkpoint.config, cut, name)
    part.here = blocks
    _warn_of_dropout(checkpoint.config)
    stored = StoredTensors(checkpoint, uncut_shapes(checkpoint.config))
    embedding, head = _ends_of(stored, part, dtype)
    ends = {_embedding_name(part.family): embedding, f"{part.family.head}.weight": head}
    sources = {own: ends.get(own, part.uncut_name(own)) for own in part.model.state_dict()}
    check_leftovers(checkpoint, stored, part, {*sources.values(), *map(part.uncut_name, ends)})
    if tied is not None and embedding == head:
        del sources[f"{part.family.head}.weight"]
        part.model.get_submodule(part.family.head).weight = tied.model.get_parameter(_embedding_name(part.family))
    materialize_buffers(part.model)
    wide = _kept_wide(part.model, dtype)
    for own, source in sources.items():
        kind = torch.float32 if own in wide else dtype
        block = part.own_block(own)
        if blocks is not None and block is not None and block not in blocks:
            shape = part.model.state_dict()[own].shape
            _assign(part.model, own, torch.zeros((), dtype=kind, device=device).expand(shape))
            continue
        tensor = stored.read(source)
        _check_shape(part, own, tensor, f"{source} in {checkpoint.folder}")
        _assign(part.model, own, tensor.to(device, kind, copy=True))
    part.requires_grad_(False).eval()
    if name != "bottom":
        _check_passes_through(part)
    return move(part, device)


def move(part: Part, device: torch.device) -> Part:
    """Bring a part to a device, in place; weights of blocks that are not to compute here still take no memory."""
    for parameter in part.parameters():
        if parameter.numel() > 1 and not any(parameter.stride()):
            parameter.data = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
    return part.to(device)


def empty_part(config: PreTrainedConfig, cut: Cut, name: PartName) -> Part:
    """A part on the ``meta`` device: shapes without memory."""
    return part_of_blocks(config, name, cut.blocks(name, config.get_text_config().num_hidden_layers))


def part_of_blocks(config: PreTrainedConfig, name: PartName, blocks: Sequence[int]) -> Part:
    """A part on the ``meta`` device with these blocks of the uncut model, of which one may be repeated.

    The blocks are the uncut model's own, built with their uncut indices: whatever a family derives from a block's index
    (its window, its rope, whether it is a mixture of experts) is as in the uncut model.

    Args:
        config: the uncut model's.
    """
    family = family_of(config)
    own = copy.deepcopy(config.get_text_config())
    own.tie_word_embeddings = False  # one part has no pair to tie; load_part shares the embedding
    for setting in _dropouts(own):
        setattr(own, setting, 0.0)
    if family.unused:
        setattr(own, family.unused, None)
    model = uncut_shapes(own)
    backbone = family.backbone_of(model)
    setattr(backbone, family.blocks, nn.ModuleList(_renumbered(model, backbone.get_submodule(family.blocks), blocks)))
    for setting in PER_BLOCK:
        values = getattr(own, setting, None)
        if values is not None:
            vars(model.config)[setting] = [values[number] for number in blocks]
    model.config.num_hidden_layers = len(blocks)
    model.config.return_dict = True  # what a caller of the split model gets is decided there
    install(model, backbone)
    if name != "bottom":
        setattr(backbone, family.embedding, None)
        if family.input_scale:
            setattr(backbone, family.input_scale, 1.0)
    if name != "top":
        setattr(backbone, family.norm, nn.Identity())
        setattr(model, family.head, None)
    return Part(name, model, family, blocks[0], config)


def _renumbered(model: PreTrainedModel, uncut: nn.Module, blocks: Sequence[int]) -> list[nn.Module]:
    """Copies of these blocks with their indices in the part, as caches have a layer for each of the part's blocks. All
    modules share the model's configuration."""
    shared = {id(model.config): model.config}
    taken = [copy.deepcopy(uncut.get_submodule(str(number)), dict(shared)) for number in blocks]
    for index, block in enumerate(taken):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]
    return taken


def _dropouts(config: PreTrainedConfig) -> dict[str, float]:
    """The dropout probabilities of a configuration, and its routers' noise, that are not zero."""
    found = {name: value for name, value in vars(config).items() if "drop" in name or "jitter" in name}
    return {name: value for name, value in found.items() if isinstance(value, float) and value > 0}


def _warn_of_dropout(config: PreTrainedConfig) -> None:
    """Say that a base model's dropout is off, in training too."""
    if found := _dropouts(config.get_text_config()):
        listed = ", ".join(f"{name} = {value}" for name, value in found.items())
        warnings.warn(f"the base model's dropout ({listed}) is off in all parts, in training too", stacklevel=3)


def _kept_wide(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """The tensors that the family keeps in fp32 whatever the model's dtype."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return set()
    pattern = build_glob_alternation(list(plan))[0]
    return {name for name in model.state_dict() if pattern.search(name)}


@torch.no_grad()
def _check_passes_through(part: Part) -> None:
    """Raise ``ModelError`` if the backbone changes its input before its first block, as it must in bottom alone."""
    backbone, own = part.family.backbone_of(part.model), part.family
    h_12D = torch.linspace(-1, 1, 2 * part.config.hidden_size).view(1, 2, -1)
    blocks, norm = getattr(backbone, own.blocks), getattr(backbone, own.norm)
    try:
        setattr(backbone, own.blocks, nn.ModuleList())
        setattr(backbone, own.norm, nn.Identity())
        passed_12D = part.hidden(inputs_embeds=h_12D, use_cache=False)
    finally:
        setattr(backbone, own.blocks, blocks)
        setattr(backbone, own.norm, norm)
    if not torch.equal(passed_12D, h_12D):
        raise ModelError(
            f"the {part.config.model_type} model changes hidden states before its first block, so the {part.name} would"
            " not be the uncut model's",
            remedy="name the attribute that scales embeddings as input_scale in the family's row",
        )


def _embedding_name(family: Family) -> str:
    """The embedding's name in a part."""
    return f"{family.backbone}.{family.embedding}.weight"


def _ends_of(stored: StoredTensors, part: Part, dtype: torch.dtype) -> tuple[str, str]:
    """The uncut model's names of the tensors that are embedding and head, one name if they are tied.

    As transformers: where the configuration ties them but both are stored and differ, they stay apart; where one alone
    is stored, it is both. No part but top reads them to find out.
    """
    embedding, head = part.uncut_name(_embedding_name(part.family)), f"{part.family.head}.weight"
    if not stored.tied:
        return embedding, head
    both = [name for name in (embedding, head) if name in stored]
    if len(both) == 2 and part.name == "top":
        first, second = (stored.read(name).to(dtype) for name in both)
        if not torch.equal(first, second):
            return embedding, head
    return (both[0], both[0]) if both else (embedding, embedding)


def check_leftovers(checkpoint: Checkpoint, stored: StoredTensors, part: Part, used: Collection[str]) -> None:
    """Refuse a checkpoint with tensors that belong to this part but not to its family's model.

    Args:
        used: the tensors of the uncut model that the part takes.

    Raises:
        ModelError: there are such tensors.
    """
    model, family = part.model, part.family
    owned = [f"{family.block_prefix()}{number}." for number in range(model.config.num_hidden_layers)]
    if part.name == "bottom":
        owned.append(f"{family.backbone}.{family.embedding}.")
    if part.name == "top":
        owned += [f"{family.backbone}.{family.norm}.", f"{family.head}."]
    prefixes = tuple(map(part.uncut_name, owned))
    left = [weight for name in stored.unused(used) if name.startswith(prefixes) for weight in stored.sources(name)]
    harmless = {r"rotary_emb\.inv_freq", *(model._keys_to_ignore_on_load_unexpected or ())}
    checkpoint.check_leftovers(left, harmless)


def _check_shape(part: Part, own: str, tensor: torch.Tensor, place: str) -> None:
    expected = tuple(part.model.state_dict()[own].shape)
    if tuple(tensor.shape) != expected:
        raise ModelError(
            f"{place} has shape {tuple(tensor.shape)}, config.json requires {expected}",
            remedy="give model.path a folder whose config.json belongs to its weights",
        )


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, leaf, value if leaf in module._buffers else nn.Parameter(value, requires_grad=False))


@torch.no_grad()
def materialize_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that checkpoints lack (rotary frequencies, embedding scales) with the family's own code.

    Raises:
        ModelError: the family's code leaves one without a value.
    """
    for module in model.modules():
        on_meta = {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_meta and name in module._non_persistent_buffers_set
        }
        for name, buffer in on_meta.items():
            setattr(module, name, torch.full_like(buffer, torch.nan, device="cpu"))
        if on_meta:
            model._init_weights(module)  # parameters are still on meta: only the buffers get values
        if any(getattr(module, name).isnan().any() for name in on_meta):
            raise ModelError(
                f"transformers does not compute {', '.join(on_meta)} of {type(module).__name__}",
                remedy="use a model of another type",
            )
