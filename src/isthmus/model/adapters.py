"""LoRA adapters of a part, injected with peft. All names are tensor names of the uncut model."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig

from isthmus.errors import ModelError
from isthmus.model import bottleneck
from isthmus.model.cut import Cut, Part, empty_part
from isthmus.model.device import CPU
from isthmus.recipe import LoraSection, Recipe

TensorDict = dict[str, torch.Tensor]
_PEFT_PREFIX = "base_model.model."


def add_adapter(part: Part, lora: LoraSection, seed: int, *, freeze_a: bool) -> None:
    """Inject LoRA layers into a part, in place. A bottom that ``lora`` freezes gets none.

    A has the same random initial value in every process, derived from ``seed`` and the tensor's uncut name. B is zero.

    Args:
        freeze_a: train B only, so that averages of adapters are exact.

    Raises:
        ModelError: ``lora.targets`` names a layer that is absent or not linear.
    """
    if part.name == "bottom" and lora.freeze_bottom:
        return
    if absent := _absent(part, lora.targets):
        raise ModelError(
            f"the {part.name} has no layers named {', '.join(absent)}",
            remedy="name layers of this model in lora.targets",
        )
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=0.0)
    _refuse_experts(config, part)
    try:
        inject_adapter_in_model(config, part.model)
    except ValueError as error:
        raise ModelError(
            f"LoRA does not support the layers {', '.join(lora.targets)} of the {part.name}",
            remedy="name linear layers in lora.targets",
        ) from error
    for name, parameter in _added_parameters(part):
        if "lora_A" in name:
            parameter.requires_grad_(not freeze_a)
    _initialize(part, seed)


def add_trained_layers(part: Part, recipe: Recipe) -> None:
    """Add all trainable layers of the recipe to a part: LoRA, and the layers of a bottleneck or a residual path.

    Raises:
        ModelError: the recipe does not fit the part.
    """
    exact = recipe.trunk.adapter == "replica" if part.name == "trunk" else recipe.federation.lora == "frozen-a"
    add_adapter(part, recipe.lora, recipe.seed, freeze_a=exact)
    frozen = part.name == "bottom" and recipe.lora.freeze_bottom
    bottleneck.add_layers(part, recipe.boundary, frozen=frozen)
    _initialize(part, recipe.seed, narrow=recipe.boundary.width is not None)


def trainable(part: Part) -> dict[str, nn.Parameter]:
    """The trainable parameters by uncut name, sorted by name."""
    return dict(sorted((name, parameter) for name, parameter in _added_parameters(part) if parameter.requires_grad))


def adapter_parameters(part: Part) -> dict[str, nn.Parameter]:
    """All adapter parameters by uncut name, frozen ones included."""
    return dict(_added_parameters(part))


def adapter_of(part: Part) -> TensorDict:
    """A detached copy of all adapter tensors, by uncut name."""
    return {name: parameter.detach().clone() for name, parameter in _added_parameters(part)}


@torch.no_grad()
def load_adapter(part: Part, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy ``tensors`` into the part's adapter parameters of the same uncut names; other names are ignored."""
    for name, parameter in _added_parameters(part):
        if name in tensors:
            parameter.copy_(tensors[name])


def trained_factors(lora: str, round: int) -> str:
    """The LoRA factors that train in a round: ``"A"``, ``"B"`` or ``"AB"``.

    With ``alternating``, B trains first: it starts at zero, and A has no gradient until B changes.

    Args:
        lora: the recipe's ``federation.lora``.
        round: from 1.
    """
    if lora == "alternating":
        return "B" if round % 2 else "A"
    return "B" if lora == "frozen-a" else "AB"


def select_factors(tensors: Mapping[str, torch.Tensor], factors: str) -> TensorDict:
    """The tensors that train in a round that trains these factors. Tensors that are not LoRA factors always train."""
    frozen = [f"lora_{factor}" for factor in "AB" if factor not in factors]
    return {name: one for name, one in tensors.items() if not any(factor in name for factor in frozen)}


def shared_shapes(parts: Iterable[Part]) -> dict[str, tuple[int, ...]]:
    """Uncut names and shapes of the tensors that silos send to the root: all trainable tensors of these parts."""
    return {name: tuple(parameter.shape) for part in parts for name, parameter in trainable(part).items()}


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], lora: LoraSection, base_model: str) -> None:
    """Write a standard PEFT adapter folder for the uncut model: ``adapter_config.json`` and safetensors.

    Args:
        tensors: by uncut name.
        base_model: name or path that the adapter's configuration gives for the base model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=_exported_targets(tensors, lora),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    named = {_PEFT_PREFIX + name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def empty_ends(config: PreTrainedConfig, recipe: Recipe) -> list[Part]:
    """Bottom and top with their adapters on the ``meta`` device: shapes without memory."""
    cut = Cut(recipe.model.bottom, recipe.model.top)
    ends = [empty_part(config, cut, "bottom"), empty_part(config, cut, "top")]
    for part in ends:
        add_trained_layers(part, recipe)
    return ends


def initial_tensors(config: PreTrainedConfig, recipe: Recipe) -> TensorDict:
    """The initial adapter tensors of bottom and top, by uncut name. No model weights are read."""
    named = [pair for part in empty_ends(config, recipe) for pair in _added_parameters(part)]
    narrow = recipe.boundary.width is not None
    return {name: _initial_value(parameter.shape, recipe.seed, name, narrow) for name, parameter in named}


def _absent(part: Part, targets: Iterable[str]) -> list[str]:
    """The target names that match no layer of the part. peft raises only if all are absent.

    Head and embedding are excepted: only one of the ends has each.
    """
    names = [f".{name}" for name, _ in part.model.named_modules()]
    elsewhere = {part.family.head, part.family.embedding}
    return [one for one in targets if one not in elsewhere and not any(name.endswith(f".{one}") for name in names)]


def _refuse_experts(config: LoraConfig, part: Part) -> None:
    """Raise ``ModelError`` if peft would adapt a mixture's experts or router, which it does by other code than linear
    layers."""
    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, part.model, None)
        found = bool(converted.target_parameters)
    except ValueError:  # one of two names that experts keep in one tensor
        found = True
    if found:
        raise ModelError(
            f"lora.targets names experts of a {part.config.model_type} model, which are not linear layers",
            remedy="name layers of the attention in lora.targets",
        )


def _exported_targets(tensors: Iterable[str], lora: LoraSection) -> list[str]:
    """The target modules of the exported folder.

    With a frozen bottom they are full module names, so that peft adds no adapter to bottom's blocks.
    """
    if not lora.freeze_bottom:
        return sorted(lora.targets)
    return sorted({name.rpartition(".lora_")[0] for name in tensors})


def _added_parameters(part: Part) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are not the base model's, by uncut name, without peft's adapter name (``.default``)."""
    return [
        (part.uncut_name(name).replace(".default", ""), parameter)
        for name, parameter in part.model.named_parameters()
        if "lora_" in name or name in bottleneck.LAYER_WEIGHTS
    ]


@torch.no_grad()
def _initialize(part: Part, seed: int, *, narrow: bool = False) -> None:
    """Set every adapter parameter to its initial value."""
    with CPU:  # the same random values for every device
        for name, parameter in _added_parameters(part):
            if not parameter.is_meta:
                parameter.copy_(_initial_value(parameter.shape, seed, name, narrow))


def _initial_value(shape: torch.Size, seed: int, name: str, narrow: bool) -> torch.Tensor:
    """The initial value of a tensor. It depends on nothing but the arguments.

    B is zero. A is uniform in ±1/√(inputs), peft's default (Kaiming with a = √5).
    """
    if "lora_B" in name:
        return torch.zeros(shape)
    drawn = name if "lora_A" in name else "boundary"  # silo and trunk compute the same basis
    digest = hashlib.sha256(f"{seed}/{drawn}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if name in bottleneck.LAYER_WEIGHTS:
        return bottleneck.initial_value(name, shape, generator, narrow=narrow)
    bound = 1 / math.sqrt(shape[1])
    return torch.rand(shape, generator=generator) * (2 * bound) - bound
