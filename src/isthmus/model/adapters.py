"""LoRA adapters on a part, through peft, under the uncut model's names."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig

from isthmus.errors import ModelError
from isthmus.model import bottleneck
from isthmus.model.cut import Cut, Part, empty_part
from isthmus.model.device import CPU
from isthmus.recipe import LoraSection, Recipe

Tensors = dict[str, torch.Tensor]
_PEFT_PREFIX = "base_model.model."


def add_adapter(part: Part, lora: LoraSection, seed: int, *, freeze_a: bool) -> None:
    """Inject LoRA layers into a part, in place; a bottom that ``lora`` freezes gets none.

    A starts from the same draw in every process, fixed by ``seed`` and the tensor's uncut name; B at zero.

    Args:
        freeze_a: train B only, so that averages of adapters are exact.

    Raises:
        ModelError: a target name is no layer's, or not a linear layer's.
    """
    if part.name == "bottom" and lora.freeze_bottom:
        return
    if absent := _absent(part, lora.targets):
        raise ModelError(f"the {part.name} has no layers named {', '.join(absent)}", remedy="correct lora.targets")
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=0.0)
    try:
        inject_adapter_in_model(config, part.model)
    except ValueError as error:
        raise ModelError(
            f"no adapter fits the layers {', '.join(lora.targets)} of the {part.name}", remedy="correct lora.targets"
        ) from error
    for name, parameter in _added_parameters(part):
        if "lora_A" in name:
            parameter.requires_grad_(not freeze_a)
    _start(part, seed)


def equip(part: Part, recipe: Recipe) -> None:
    """Add to a part all that the recipe has it learn: LoRA, and the layers of a bottleneck or residual path.

    Raises:
        ModelError: the recipe does not fit the part.
    """
    exact = recipe.trunk.adapter == "replica" if part.name == "trunk" else recipe.federation.lora == "frozen-a"
    add_adapter(part, recipe.lora, recipe.seed, freeze_a=exact)
    frozen = part.name == "bottom" and recipe.lora.freeze_bottom
    bottleneck.add_crossing(part, recipe.boundary, frozen=frozen)
    _start(part, recipe.seed, narrow=recipe.boundary.width is not None)


def trainable(part: Part) -> dict[str, nn.Parameter]:
    """The parameters that train, by uncut name, in the order of their names."""
    return dict(sorted((name, parameter) for name, parameter in _added_parameters(part) if parameter.requires_grad))


def parameters(part: Part) -> dict[str, nn.Parameter]:
    """All adapter tensors, by uncut name."""
    return dict(_added_parameters(part))


def adapter_of(part: Part) -> Tensors:
    """A copy of all adapter tensors, by uncut name."""
    return {name: parameter.detach().clone() for name, parameter in _added_parameters(part)}


@torch.no_grad()
def load_adapter(part: Part, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set those of the part's adapter tensors that are given."""
    for name, parameter in _added_parameters(part):
        if name in tensors:
            parameter.copy_(tensors[name])


def factors(lora: str, round: int) -> str:
    """Which factors of LoRA train in this round of a recipe's ``federation.lora``: A, B or both.

    Where they alternate, B is first: it starts at zero, and until it moves A has no gradient.
    """
    if lora == "alternating":
        return "B" if round % 2 else "A"
    return "B" if lora == "frozen-a" else "AB"


def trained(tensors: Mapping[str, torch.Tensor], factors: str) -> Tensors:
    """Those of the tensors that train when these factors do; what is no factor trains in every round."""
    resting = [f"lora_{factor}" for factor in "AB" if factor not in factors]
    return {name: one for name, one in tensors.items() if not any(factor in name for factor in resting)}


def shared_shapes(parts: Iterable[Part]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what silos and root share: the ends' tensors that train in some round."""
    return {name: tuple(parameter.shape) for part in parts for name, parameter in trainable(part).items()}


def export(folder: Path, tensors: Mapping[str, torch.Tensor], lora: LoraSection, base_model: str) -> None:
    """Write a standard PEFT adapter folder for the uncut model."""
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
    """Bottom and top with their adapters: every shape, no memory."""
    cut = Cut(recipe.model.bottom, recipe.model.top)
    ends = [empty_part(config, cut, "bottom"), empty_part(config, cut, "top")]
    for part in ends:
        equip(part, recipe)
    return ends


def initial_tensors(config: PreTrainedConfig, recipe: Recipe) -> Tensors:
    """The ends' adapter tensors as every silo starts with them, by uncut name, without loading a model."""
    named = [pair for part in empty_ends(config, recipe) for pair in _added_parameters(part)]
    narrow = recipe.boundary.width is not None
    return {name: _initial(parameter.shape, recipe.seed, name, narrow) for name, parameter in named}


def _absent(part: Part, targets: Iterable[str]) -> list[str]:
    """Those of the names that no layer of the part has; peft complains only if all are. An end's own may be absent."""
    names = [f".{name}" for name, _ in part.model.named_modules()]
    elsewhere = {part.family.head, part.family.embedding}
    return [one for one in targets if one not in elsewhere and not any(name.endswith(f".{one}") for name in names)]


def _exported_targets(tensors: Iterable[str], lora: LoraSection) -> list[str]:
    """The layers that the folder names: from peft too, those of a frozen bottom must not get an adapter."""
    if not lora.freeze_bottom:
        return sorted(lora.targets)
    return sorted({name.rpartition(".lora_")[0] for name in tensors})


def _added_parameters(part: Part) -> list[tuple[str, nn.Parameter]]:
    """What the base model lacks, by uncut name, without peft's adapter name (``.default``)."""
    return [
        (part.whole_name(name).replace(".default", ""), parameter)
        for name, parameter in part.model.named_parameters()
        if "lora_" in name or name in bottleneck.NAMES
    ]


@torch.no_grad()
def _start(part: Part, seed: int, *, narrow: bool = False) -> None:
    """Give every adapter tensor its first value."""
    with CPU:  # one draw for all devices
        for name, parameter in _added_parameters(part):
            if not parameter.is_meta:
                parameter.copy_(_initial(parameter.shape, seed, name, narrow))


def _initial(shape: torch.Size, seed: int, name: str, narrow: bool) -> torch.Tensor:
    """From a draw that only the name fixes: A uniform in ±1/√(inputs), peft's default (Kaiming with a = √5); B is 0."""
    if "lora_B" in name:
        return torch.zeros(shape)
    drawn = name if "lora_A" in name else "boundary"  # silo and trunk draw one basis
    digest = hashlib.sha256(f"{seed}/{drawn}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if name in bottleneck.NAMES:
        return bottleneck.initial(name, shape, generator, narrow=narrow)
    bound = 1 / math.sqrt(shape[1])
    return torch.rand(shape, generator=generator) * (2 * bound) - bound
