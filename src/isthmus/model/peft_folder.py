"""A PEFT folder on disk: reading one, and checking it against a recipe before anything starts from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file

from isthmus.errors import ModelError, NotSupportedError
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import LoraSection

PREFIX = "base_model.model."
"""What peft writes before the name that a tensor has in the uncut model."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
READ = {"r", "lora_alpha", "use_rslora", "target_modules", "base_model_name_or_path"}
"""Keys of the configuration that are compared with the recipe."""
WITHOUT_EFFECT = {
    *("peft_type", "peft_version", "task_type", "inference_mode", "auto_mapping", "revision", "lora_dropout"),
    *("exclude_modules", "megatron_core", "runtime_config", "ensure_weight_tying"),
}
"""Keys that do not change what the adapter's tensors compute, or whose effect shows in the tensors' names."""
INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base model's weights as they are."""


class PeftFolder:
    """A LoRA adapter as peft saves it.

    Attributes:
        path: the folder.
        config: its ``adapter_config.json``.
        tensors: by uncut name, fp32.
    """

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.path, self.config, self.tensors = path, config, tensors

    @classmethod
    def read(cls, path: Path) -> PeftFolder:
        """The adapter in this folder.

        Raises:
            ModelError: the folder is missing or incomplete, or a tensor is not of a float type or not finite.
            NotSupportedError: it is no plain LoRA adapter.
        """
        try:
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
            stored = load_file(path / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(
                f"no readable PEFT adapter in {path}: {error}",
                remedy=f"name a folder with {CONFIG} and {WEIGHTS}, as peft's save_pretrained writes it",
            ) from error
        _check_kind(path, config)
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
        for name, tensor in tensors.items():
            _check_values(path, name, tensor)
        return cls(path, config, {name: tensor.float() for name, tensor in tensors.items()})

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the tensors' names, shapes and values, and of their scale."""
        scale = {key: self.config.get(key) for key in ("r", "lora_alpha", "use_rslora")}
        digest = hashlib.sha256(json.dumps(scale, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_base(self, model: str) -> None:
        """Check that the adapter is of this base model.

        A base model that is a folder on this machine is compared by its fingerprint, another one by the last part of
        its name. An adapter that names none is taken at its tensors' shapes.

        Args:
            model: the recipe's ``model.path``.

        Raises:
            ModelError: it is of another.
        """
        named = self.config.get("base_model_name_or_path")
        if not named or named == model:
            return
        if (Path(named).expanduser() / "config.json").is_file():
            same = Checkpoint(named).fingerprint == Checkpoint(model).fingerprint
        else:
            same = Path(named).name == Path(model).name
        if not same:
            raise ModelError(
                f"the adapter in {self.path} is of the base model {named}, the recipe's model.path is {model}",
                remedy="give model.path that model; if both are the same one under two names, correct "
                f"base_model_name_or_path in {CONFIG}",
            )

    def check_scale(self, lora: LoraSection) -> None:
        """Check rank and scale.

        Raises:
            ModelError: the recipe has another rank, alpha or rslora.
        """
        own = {"r": ("rank", lora.rank), "lora_alpha": ("alpha", lora.alpha), "use_rslora": ("rslora", lora.rslora)}
        defaults = LoraConfig()
        for key, (name, expected) in own.items():
            found = self.config.get(key, getattr(defaults, key))
            if found != expected:
                raise ModelError(
                    f"the adapter in {self.path} has {key} = {found}, the recipe has lora.{name} = {expected}",
                    remedy=f"set lora.{name} = {str(found).lower()}, or start from another adapter",
                )

    def check_tensors(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the folder has just these tensors.

        Args:
            expected: shapes by uncut name.

        Raises:
            ModelError: layers are missing, or there are others, or a shape is another.
        """
        found, wanted = _layers(self.tensors), _layers(expected)
        if found != wanted:
            raise ModelError(
                f"the adapter in {self.path} is of the layers {', '.join(sorted(found))}; "
                f"the recipe's lora.targets are {', '.join(sorted(wanted))}",
                remedy="give lora.targets the adapter's layers, or start from another adapter",
            )
        if copied := [name for name in self.tensors if ".base_layer." in name]:
            raise ModelError(
                f"the adapter in {self.path} has weights of the base model beside it: {copied[0]}",
                remedy="save it without them: peft's save_pretrained(..., save_embedding_layers=False)",
            )
        for what, names in {
            "lacks": expected.keys() - self.tensors.keys(),
            "has beyond what the recipe trains": self.tensors.keys() - expected.keys(),
        }.items():
            if names:
                raise ModelError(
                    f"the adapter in {self.path} {what}: {min(names)} and {len(names) - 1} more",
                    remedy="start from an adapter of the same base model, lora.targets and lora.freeze_bottom",
                )
        for name, shape in expected.items():
            if tuple(self.tensors[name].shape) != shape:
                raise ModelError(
                    f"{name} in {self.path} has shape {tuple(self.tensors[name].shape)}, expected {shape}",
                    remedy="start from an adapter of this base model and rank",
                )


def _check_kind(path: Path, config: Any) -> None:
    """Refuse everything but plain LoRA, by the name of its key."""
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise NotSupportedError(
            f"the adapter in {path} is of the kind {kind}", remedy="start from a LoRA adapter, peft_type = LORA"
        )
    defaults = LoraConfig().to_dict()
    for key, value in config.items():
        if key in READ | WITHOUT_EFFECT or value == defaults.get(key) or (not value and not defaults.get(key)):
            continue
        if key == "init_lora_weights" and value in INITIAL:
            continue
        raise NotSupportedError(
            f"the adapter in {path} has {key} = {value}, which isthmus does not have",
            remedy=f"start from a plain LoRA adapter, without {key}",
        )


def _check_values(path: Path, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise ModelError(
            f"{name} in {path} has values of {tensor.dtype} or NaN or infinity", remedy="save the adapter again"
        )


def _layers(names: Mapping[str, Any]) -> set[str]:
    """The last names of the layers that these tensors adapt."""
    return {name.rpartition(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name}
