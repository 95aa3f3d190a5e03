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
from isthmus.model.cut import Cut, Part, empty_part
from isthmus.recipe import LoraSection

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
    for name, parameter in _lora_parameters(part):
        if "lora_A" in name:
            parameter.requires_grad_(not freeze_a)
            if not parameter.is_meta:
                parameter.data.copy_(_initial(parameter.shape, seed, name))


def trainable(part: Part) -> dict[str, nn.Parameter]:
    """The parameters that train, by uncut name, in the order of their names."""
    return dict(sorted((name, parameter) for name, parameter in _lora_parameters(part) if parameter.requires_grad))


def parameters(part: Part) -> dict[str, nn.Parameter]:
    """All adapter tensors, by uncut name."""
    return dict(_lora_parameters(part))


def adapter_of(part: Part) -> Tensors:
    """A copy of all adapter tensors, by uncut name."""
    return {name: parameter.detach().clone() for name, parameter in _lora_parameters(part)}


@torch.no_grad()
def load_adapter(part: Part, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set those of the part's adapter tensors that are given."""
    for name, parameter in _lora_parameters(part):
        if name in tensors:
            parameter.copy_(tensors[name])


def shared_shapes(parts: Iterable[Part]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what silos and root exchange each round: the trainable tensors of the ends."""
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


def initial_tensors(config: PreTrainedConfig, lora: LoraSection, cut: Cut, seed: int) -> Tensors:
    """The ends' adapter tensors as every silo starts with them, by uncut name, without loading a model."""
    tensors: Tensors = {}
    for name in ("bottom", "top"):
        part = empty_part(config, cut, name)
        add_adapter(part, lora, seed, freeze_a=True)
        for whole, parameter in _lora_parameters(part):
            is_a = "lora_A" in whole
            tensors[whole] = _initial(parameter.shape, seed, whole) if is_a else torch.zeros(parameter.shape)
    return tensors


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


def _lora_parameters(part: Part) -> list[tuple[str, nn.Parameter]]:
    """Adapter parameters by uncut name, without peft's adapter name (``.default``)."""
    return [
        (part.whole_name(name).replace(".default", ""), parameter)
        for name, parameter in part.model.named_parameters()
        if "lora_" in name
    ]


def _initial(shape: torch.Size, seed: int, name: str) -> torch.Tensor:
    """Uniform in ±1/√(inputs), peft's default for A (Kaiming with a = √5), from a draw that only the name fixes."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return torch.rand(shape, generator=generator) * (2 * bound) - bound
