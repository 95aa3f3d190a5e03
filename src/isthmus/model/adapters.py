"""LoRA adapters of a part, injected with peft. All names are tensor names of the uncut model.

Adapters are fp32 over a base of any type, as peft keeps them: 16 bits are too few for Adam's small steps. A layer's
input is converted to fp32 for the adapter, and its result back to the base's type.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import save_file
from torch import nn
from torch.random import fork_rng
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from isthmus.errors import ModelError, NotSupportedError
from isthmus.model import bottleneck
from isthmus.model.cut import Cut, Part, empty_part
from isthmus.model.device import CPU
from isthmus.model.peft_folder import PREFIX, PeftFolder
from isthmus.recipe import LoraSection, Recipe
from isthmus.recipe.sections.lora import ALL_LINEAR

T = TypeVar("T")
TensorDict = dict[str, torch.Tensor]
ADAPTER = "default"
"""The name that peft knows the adapter of every part by."""


def add_adapter(part: Part, lora: LoraSection, seed: int, *, freeze_a: bool) -> None:
    """Inject LoRA layers into a part, in place. A bottom that ``lora`` freezes gets none.

    A has the same random initial value in every process, derived from ``seed`` and the tensor's uncut name. B is zero.

    Args:
        freeze_a: train B only, so that averages of adapters are exact.

    Raises:
        ModelError: ``lora.targets`` names a layer that is absent or not linear.
        NotSupportedError: it names the embedding, or a head that is tied to it.
    """
    if part.name == "bottom" and lora.freeze_bottom:
        return
    _check_embedding(part, lora)
    if absent := _absent(part, lora.targets):
        raise ModelError(
            f"the {part.name} has no layers named {', '.join(absent)}",
            remedy="name layers of this model in lora.targets",
        )
    targets = _linear_layers(part) if lora.all_linear else list(lora.targets)
    _refuse_experts(_peft_config(lora, ALL_LINEAR if lora.all_linear else targets), part, targets)
    try:
        inject_adapter_in_model(_peft_config(lora, targets), part.model)
    except ValueError as error:
        raise ModelError(
            f"LoRA does not support the layers {', '.join(lora.targets)} of the {part.name}",
            remedy="name linear layers in lora.targets",
        ) from error
    for name, parameter in _added_parameters(part):
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            parameter.requires_grad_(not freeze_a)
    _initialize(part, seed)


def add_trained_layers(part: Part, recipe: Recipe) -> None:
    """Add all trainable layers of the recipe to a part: LoRA, and the layers of a bottleneck or a residual path. They
    start from the recipe's ``lora.start``, if it has one.

    Raises:
        ModelError: the recipe does not fit the part, or the folder ``lora.start`` not the recipe.
        NotSupportedError: the recipe, or that folder, asks for what adapters here do not have.
    """
    exact = recipe.trunk.adapter == "replica" if part.name == "trunk" else recipe.freezes_a
    add_adapter(part, recipe.lora, recipe.seed, freeze_a=exact)
    frozen = part.name == "bottom" and recipe.lora.freeze_bottom
    bottleneck.add_layers(part, recipe.boundary, frozen=frozen)
    _freeze_between(part, recipe.whole)
    _initialize(part, recipe.seed, narrow=recipe.boundary.width is not None)
    if recipe.lora.start is not None and part.model.device.type != "meta":
        load_adapter(part, starting_tensors(part.whole, recipe))


def block_of(part: Part, name: str) -> int | None:
    """Index, in the uncut model, of the block that a tensor of this uncut name is of; None: of no block."""
    blocks = part.uncut_name(part.family.block_prefix() + "0.").removesuffix(f"{part.first_block}.")
    return int(name.removeprefix(blocks).partition(".")[0]) if name.startswith(blocks) else None


def _freeze_between(part: Part, recipe: Recipe) -> None:
    """Freeze the adapters of blocks that some silos keep and others leave to the trunk, unless the recipe trains them;
    then the trunk trains the factors that the silos train.

    Args:
        recipe: the federation's.
    """
    total: int = part.whole.get_text_config().num_hidden_layers
    bottom, top = recipe.widest
    clear = {*range(recipe.model.bottom), *range(total - recipe.model.top, total), *range(bottom, total - top)}
    at_rest = ("lora_A",) if recipe.trains_between and recipe.federation.lora == "frozen-a" else ("lora_",)
    if recipe.trains_between and recipe.federation.lora != "frozen-a":
        return
    for name, parameter in _added_parameters(part):
        if any(kind in name for kind in at_rest) and (block_of(part, name) or 0) not in clear:
            parameter.requires_grad_(False)


def starting_tensors(config: PreTrainedConfig, recipe: Recipe) -> TensorDict:
    """The tensors of the recipe's ``lora.start``, of bottom, trunk and top, fp32, by uncut name; none without one.

    Args:
        config: of the uncut model.

    Raises:
        ModelError: the folder cannot be read, or is not of this base model, rank, scale or layers.
        NotSupportedError: it has what adapters here do not have, such as DoRA's magnitudes.
    """
    if recipe.lora.start is None:
        return {}
    folder = PeftFolder.read(Path(recipe.lora.start))
    folder.check_base(recipe.model.path)
    folder.check_scale(recipe.lora)
    plain = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"start": None})})
    cut = Cut(recipe.model.bottom, recipe.model.top)
    parts = [empty_part(config, cut, name) for name in ("bottom", "trunk", "top")]
    for part in parts:
        add_trained_layers(part, plain)
    named = [pair for part in parts for pair in _added_parameters(part) if "lora_" in pair[0]]
    folder.check_tensors({name: tuple(parameter.shape) for name, parameter in named})
    return folder.tensors


def start_digest(recipe: Recipe) -> str:
    """SHA-256, in hex, of the adapter that all parties start from; empty without ``lora.start``.

    It covers the tensors and their scale, not the folder's place.

    Raises:
        ModelError, NotSupportedError: as ``starting_tensors``.
    """
    return "" if recipe.lora.start is None else PeftFolder.read(Path(recipe.lora.start)).digest


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


@contextmanager
def dropout(model: PreTrainedModel, seed: str) -> Iterator[None]:
    """Within the ``with`` block the adapters of a model drop numbers as ``lora.dropout`` says; of a split one the
    trunk's too.

    Args:
        seed: the masks of an uncut model, or of bottom and top, follow from it. Torch's own generators are as before
            after the block.
    """
    modules = [one for name, one in model.named_modules() if name.endswith(f"lora_dropout.{ADAPTER}")]
    if not any(isinstance(one, nn.Dropout) for one in modules):
        yield
        return
    if hasattr(model, "trunk"):
        modules.append(model.trunk)
    before = [one.training for one in modules]
    digest = hashlib.sha256(seed.encode()).digest()
    with fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        try:
            for one in modules:
                one.train()
            yield
        finally:
            for one, mode in zip(modules, before, strict=True):
                one.train(mode)


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


def select_factors(tensors: Mapping[str, T], factors: str) -> dict[str, T]:
    """The tensors that train in a round that trains these factors. Tensors that are not LoRA factors always train."""
    frozen = [f"lora_{factor}" for factor in "AB" if factor not in factors]
    return {name: one for name, one in tensors.items() if not any(factor in name for factor in frozen)}


def shared_shapes(parts: Iterable[Part]) -> dict[str, tuple[int, ...]]:
    """Uncut names and shapes of the tensors that silos send to the root: all trainable tensors of these parts."""
    return {name: tuple(parameter.shape) for part in parts for name, parameter in trainable(part).items()}


def lora_of(parts: Iterable[Part]) -> LoraSection | None:
    """Rank, scale and dropout of the adapters of these parts; None: none of them has any."""
    configs = [part.model.peft_config[ADAPTER] for part in parts if hasattr(part.model, "peft_config")]
    if not configs:
        return None
    one = configs[-1]
    return LoraSection(rank=one.r, alpha=float(one.lora_alpha), rslora=one.use_rslora, dropout=one.lora_dropout)


def write_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], lora: LoraSection, base_model: str, *, whole: bool = True
) -> None:
    """Write a standard PEFT adapter folder for the uncut model: ``adapter_config.json`` and safetensors.

    Args:
        tensors: by uncut name.
        base_model: name or path that the adapter's configuration gives for the base model.
        whole: whether the tensors are of all parts that have adapters; otherwise, and for the text part of a multimodal
            model, the folder names their layers one by one, so that peft adds none elsewhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    multimodal = any("language_model." in name for name in tensors)
    named_by_layer = whole and not lora.freeze_bottom and not lora.all_linear and not multimodal
    config = _peft_config(lora, sorted(lora.targets) if named_by_layer else _adapted_layers(tensors))
    config.task_type, config.base_model_name_or_path, config.inference_mode = "CAUSAL_LM", base_model, True
    config.save_pretrained(str(folder))
    named = {PREFIX + name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
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
    fresh = {name: _initial_value(parameter.shape, recipe.seed, name, narrow) for name, parameter in named}
    start = starting_tensors(config, recipe)
    return {name: start.get(name, tensor) for name, tensor in fresh.items()}


def _absent(part: Part, targets: Iterable[str]) -> list[str]:
    """The target names that match no layer of the part. peft raises only if all are absent.

    The head is excepted: only top has it.
    """
    names = [f".{name}" for name, _ in part.model.named_modules()]
    elsewhere = {part.family.head, ALL_LINEAR}
    return [one for one in targets if one not in elsewhere and not any(name.endswith(f".{one}") for name in names)]


def _refuse_experts(config: LoraConfig, part: Part, targets: Iterable[str]) -> None:
    """Raise ``ModelError`` if peft would adapt a mixture's experts or router, which it does by other code than linear
    layers, or not at all: a router whose result is more than a linear layer's.

    Args:
        targets: the names of the layers that ``config`` adapts.
    """
    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, part.model, None)
        found = bool(converted.target_parameters)
    except ValueError:  # one of two names that experts keep in one tensor
        found = True
    named = tuple(f".{target}" for target in targets)
    own = [name for name, one in part.model.named_modules() if f".{name}".endswith(named) and _has_own_forward(one)]
    if found or own:
        raise ModelError(
            f"lora.targets has experts or routers of a {part.config.model_type} model, which are not linear layers",
            remedy="name layers of the attention in lora.targets",
        )


def _has_own_forward(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def _check_embedding(part: Part, lora: LoraSection) -> None:
    """Refuse adapters of the embedding, and of a head that shares its weights: merged, they would change both."""
    family = part.family
    if family.embedding in lora.targets:
        raise NotSupportedError(
            f"lora.targets names the embedding {family.embedding}, which is not a linear layer",
            remedy=f"leave {family.embedding} out of lora.targets",
        )
    if family.head in lora.targets and getattr(part.whole, "tie_word_embeddings", False):
        raise NotSupportedError(
            f"lora.targets names {family.head}, whose weights are the embedding's too: merged into them, its adapter "
            "would change the embedding",
            remedy=f"leave {family.head} out of lora.targets, or use a base model with tie_word_embeddings = false",
        )


def _linear_layers(part: Part) -> list[str]:
    """The names in the part of all its linear layers but the head, as peft takes "all-linear"."""
    kinds = (nn.Linear, Conv1D)
    return [name for name, one in part.model.named_modules() if isinstance(one, kinds) and name != part.family.head]


def _peft_config(lora: LoraSection, targets: list[str] | str) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=targets,
    )


def _adapted_layers(tensors: Iterable[str]) -> list[str]:
    """Full names of the layers that these tensors adapt."""
    return sorted({name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name})


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
