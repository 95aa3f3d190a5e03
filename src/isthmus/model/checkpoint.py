"""A model folder on disk: its configuration, its fingerprint, and tensors read from its safetensors files by name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from isthmus.errors import ModelError
from isthmus.model.digests import METADATA, REMEDY, FileState, digests_of, header_of, state_of
from isthmus.model.portion import lacking, whole_digests
from isthmus.model.quantized import Stored, copying, stored_weights

VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
"""Keys of a configuration that change nothing of what the model computes."""
_FOLDER = "give model.path a folder with config.json and model.safetensors (or its sharded index)"
_SINGLE, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"


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
        self._states: dict[Path, FileState] = {}

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's configuration.

        Raises:
            ModelError: config.json is missing or invalid.
        """
        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            told = str(error).partition("\n")[0][:200]
            raise ModelError(f"no usable config.json in {self.folder}: {told}", remedy=_FOLDER) from error
        if not isinstance(config.dtype, torch.dtype) or not _computable(config.dtype):
            config.dtype = None  # only a hint of how to load, and the recipe says how; no model can be built in fp8
        return config

    @cached_property
    def files(self) -> dict[str, Path]:
        """The safetensors file that holds each stored tensor, by its name in the file.

        Raises:
            ModelError: there are none, or one is missing, incomplete or damaged.
        """
        single, index = self.folder / _SINGLE, self.folder / _INDEX
        self._check_folder(single)
        if single.is_file():  # as transformers, which then ignores an index
            return dict.fromkeys(self._names_in(single), single)
        if not index.exists():
            raise _no_weights(self.folder)
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            listed = {str(name): self.folder / file for name, file in places.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"cannot read {index}: {error}", remedy=REMEDY) from error
        return self._listed_files(index, listed)

    @cached_property
    def weights(self) -> dict[str, Stored]:
        """How each weight is stored, by its name; a quantized one is several tensors of the file.

        Raises:
            ModelError: the weights are quantized in a way that is not supported.
        """
        settings = getattr(self.config, "quantization_config", None)
        if settings is not None and not isinstance(settings, Mapping):
            settings = settings.to_dict()
        return stored_weights(self.files, settings, self.folder)

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """These weights by name, on the CPU, in their stored dtype; quantized ones are dequantized.

        Raises:
            ModelError: the folder lacks one, it is no floating-point number of 16 bits or more, or its file is damaged
                or was changed since it was first read.
        """
        found = {}
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for name in names:
                if name not in self.weights:
                    raise ModelError(f"{self.folder} lacks the tensor {name}{lacking(self.folder)}", remedy=_FOLDER)
                stored = self.weights[name]
                parts = [self._open(part, opened, stack).get_tensor(part) for part in stored.names]
                found[name] = self._weight(name, stored, parts)
                self.tensors_read.update(stored.names)
        return found

    def check_leftovers(self, left: Collection[str], harmless: Collection[str]) -> None:
        """Refuse weights that belong to a part but that the part did not take: it would compute without them.

        Args:
            left: these weights.
            harmless: regular expressions of names that transformers ignores for this family.

        Raises:
            ModelError: there are such weights.
        """
        left = [name for name in sorted(left) if not any(re.search(pattern, name) for pattern in harmless)]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ModelError(
                f"{self.folder} holds {left[0]}{more}, which a {self.config.model_type} model does not use",
                remedy="config.json and weights must belong together: of quantized weights, give model.path the model "
                "that was quantized; tensors that are of no use must be taken out of the files",
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the configuration and of every byte of all tensors.

        It differs for a fine-tuned, damaged or otherwise different base model, and does not depend on how the tensors
        are spread over files. The bytes are read once; see ``digests``.

        Raises:
            ModelError: as ``files``.
        """
        digest = hashlib.sha256(self.config_digest.encode())
        found, metadata = self.digests
        digest.update(json.dumps([sorted(found.items()), metadata]).encode())
        return digest.hexdigest()

    @cached_property
    def digests(self) -> tuple[dict[str, str], list[str]]:
        """SHA-256 of every tensor of the model, by name, also of those that a portion lacks; those of the files'
        metadata.

        Raises:
            ModelError: as ``files``, or a tensor is not the model's.
        """
        found: dict[str, str] = {}
        metadata = set()
        for file in sorted(set(self.files.values())):
            digests = dict(digests_of(file))
            metadata.add(digests.pop(METADATA))
            found |= digests
        for file in self._states:
            self._check_unchanged(file)
        return whole_digests(self.folder, found) or (found, sorted(metadata))

    @cached_property
    def config_digest(self) -> str:
        """SHA-256, in hex, of what the configuration says about the model's computation."""
        settings = self.config.to_diff_dict()
        for volatile in VOLATILE:
            settings.pop(volatile, None)
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def _weight(self, name: str, stored: Stored, parts: list[torch.Tensor]) -> torch.Tensor:
        try:
            weight = stored.compute(parts)
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                f"cannot dequantize {name} in {self.folder}: {error}",
                remedy="give model.path the model that was quantized, in its own 16 or 32 bits",
            ) from error
        if not _computable(weight.dtype):
            kind = str(weight.dtype).removeprefix("torch.")
            raise ModelError(
                f"{name} in {self.folder} is stored as {kind}, and config.json has no quantization_config that says "
                "how to read it",
                remedy="give model.path the model that was quantized, in its own 16 or 32 bits",
            )
        return weight

    def _check_folder(self, single: Path) -> None:
        """Refuse a folder from which transformers loads other weights than those of the usual names."""
        if named := getattr(self.config, "transformers_weights", None):
            raise ModelError(
                f"config.json in {self.folder} names {named} as its weights (transformers_weights)",
                remedy=f"save a copy with the usual names: {copying(self.folder)}",
            )
        if any(path.exists() for path in (single, self.folder / _INDEX)) and (self.folder / _ADAPTER).exists():
            raise ModelError(
                f"{self.folder} holds {_ADAPTER} beside the weights; transformers would load the base model that it "
                "names, and the adapter",
                remedy=f"move {_ADAPTER} to a folder of its own; lora.start takes a PEFT adapter to start from",
            )

    def _listed_files(self, index: Path, listed: Mapping[str, Path]) -> dict[str, Path]:
        """The file of each tensor, as the files themselves say, once they agree with the index."""
        if not listed:
            raise ModelError(f"{index} lists no tensor", remedy=REMEDY)
        found: dict[str, Path] = {}
        for file in sorted(set(listed.values())):
            names = self._names_in(file)
            if twice := next((name for name in names if name in found), None):
                raise ModelError(f"{file} and {found[twice]} both hold {twice}", remedy=REMEDY)
            found |= dict.fromkeys(names, file)
        for name, file in listed.items():
            if found.get(name) != file:
                raise ModelError(f"cannot read {file}: it lacks {name}, which {index.name} lists", remedy=REMEDY)
        return found

    def _names_in(self, file: Path) -> list[str]:
        """Names of the tensors in a file."""
        if not file.exists():
            raise ModelError(f"cannot read {file}: no such file{_unfinished(self.folder)}", remedy=REMEDY)
        self._states.setdefault(file, state_of(file))
        header = header_of(file)
        self._check_unchanged(file)
        return sorted(header.keys() - {METADATA})

    def _open(self, name: str, opened: dict[Path, Any], stack: ExitStack) -> Any:
        file = self.files[name]
        try:
            if file not in opened:
                self._check_unchanged(file)
                opened[file] = stack.enter_context(safe_open(file, "pt"))
            return opened[file]
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {file}: {error}", remedy=REMEDY) from error

    def _check_unchanged(self, file: Path) -> None:
        if state_of(file) != self._states[file]:
            raise ModelError(
                f"{file} was changed while it was in use", remedy="start again, and leave the folder as it is meanwhile"
            )


def _computable(dtype: torch.dtype) -> bool:
    """Whether a model can have weights of this type: floating-point numbers of 16 bits or more."""
    return dtype.is_floating_point and dtype.itemsize >= 2


def _no_weights(folder: Path) -> ModelError:
    """What is wrong with a folder without safetensors."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    found, remedy = "it has neither model.safetensors nor its index", _FOLDER
    if gguf:
        found = f"it has {gguf[0]} alone"
        remedy = "convert it, or give model.path the model's own folder of safetensors: " + copying(
            folder, extra=f", gguf_file={gguf[0]!r}"
        )
    elif _ADAPTER in names:
        found, remedy = "it holds an adapter alone", "give model.path the base model that adapter_config.json names"
    elif names & {"pytorch_model.bin", "pytorch_model.bin.index.json"}:
        found, remedy = "it has pytorch_model.bin alone", "save a copy as safetensors: " + copying(folder)
    return ModelError(f"no readable weights in {folder}: {found}{_unfinished(folder)}", remedy=remedy)


def _unfinished(folder: Path) -> str:
    """A note on a download that did not finish."""
    parts = [*folder.glob("*.incomplete"), *folder.glob(".cache/huggingface/download/**/*.incomplete")]
    return f" (an unfinished download is there: {parts[0].name})" if parts else ""


def _locate(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise ModelError(
            f"the model folder {path} does not exist",
            remedy=f"{_FOLDER}; if it was moved after a run, in the run directory's recipe.toml too",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:  # the hub's client raises many types of error; the user needs one
        raise ModelError(f"{path} is not a folder, and the hub did not provide it: {error}", remedy=_FOLDER) from error
