"""A model folder on disk: its configuration, its fingerprint, and tensors read from its safetensors files by name."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from isthmus.errors import ModelError

SAMPLE = 16
"""Number of values of each tensor that the fingerprint covers."""
_REMEDY = "give model.path a folder with config.json and model.safetensors (or its sharded index)"


class Checkpoint:
    """A Hugging Face model folder.

    Args:
        path: a folder, or a model id of the Hugging Face hub, which is downloaded.

    Raises:
        ModelError: the folder is missing or incomplete.
    """

    def __init__(self, path: str) -> None:
        self.folder = _locate(path)
        self.tensors_read: set[str] = set()
        """Names of the tensors that ``read`` returned so far."""

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's configuration.

        Raises:
            ModelError: config.json is missing or invalid.
        """
        try:
            return AutoConfig.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise ModelError(f"no usable config.json in {self.folder}", remedy=_REMEDY) from error

    @cached_property
    def files(self) -> dict[str, Path]:
        """The safetensors file that holds each tensor, by tensor name."""
        index = self.folder / "model.safetensors.index.json"
        try:
            if index.exists():
                names = json.loads(index.read_text())["weight_map"]
                return {name: self.folder / file for name, file in names.items()}
            single = self.folder / "model.safetensors"
            with safe_open(single, "pt") as tensors:
                return dict.fromkeys(tensors.keys(), single)
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"no readable weights in {self.folder}: {error}", remedy=_REMEDY) from error

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """These tensors by name, on the CPU, in their stored dtype."""
        found = {}
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for name in names:
                found[name] = self._open(name, opened, stack).get_tensor(name)
                self.tensors_read.add(name)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the configuration, the shape of every tensor and ``SAMPLE`` values of each.

        It differs for a fine-tuned or otherwise different base model. No tensor is read in full.
        """
        digest = hashlib.sha256()
        settings = self.config.to_diff_dict()
        for volatile in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"):
            settings.pop(volatile, None)
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for name in sorted(self.files):
                values = self._open(name, opened, stack).get_slice(name)
                digest.update(f"{name}{values.get_shape()}".encode())
                digest.update(_sample(values))
        return digest.hexdigest()

    def _open(self, name: str, opened: dict[Path, Any], stack: ExitStack) -> Any:
        if name not in self.files:
            raise ModelError(f"{self.folder} lacks the tensor {name}", remedy=_REMEDY)
        file = self.files[name]
        try:
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(file, "pt"))
            opened[file].get_slice(name)  # fails here if the file lacks a tensor that the index lists
            return opened[file]
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {file}: {error}", remedy=_REMEDY) from error


def _sample(values: Any) -> bytes:
    """A few values of a tensor's middle row, as float32 bytes."""
    shape = values.get_shape()
    middle = shape[0] // 2
    row = values[middle : middle + 1].flatten()
    stride = max(1, row.numel() // SAMPLE)
    picked: bytes = row[::stride][:SAMPLE].to(torch.float32).contiguous().numpy().tobytes()
    return picked


def _locate(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise ModelError(f"the model folder {path} does not exist", remedy=_REMEDY)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:  # the hub's client raises many types of error; the user needs one
        raise ModelError(f"{path} is not a folder, and the hub did not provide it: {error}", remedy=_REMEDY) from error
