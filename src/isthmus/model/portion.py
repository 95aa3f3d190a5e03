"""A silo's portion of a model folder: configuration, tokenizer, and the tensors of its own parts alone.

A portion has the whole model's fingerprint: ``portion.json`` holds the digests of the tensors that are not in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file

from isthmus.errors import ModelError

if TYPE_CHECKING:
    from isthmus.model.cut import Cut

PORTION = "portion.json"
FILE_KINDS = (".json", ".txt", ".model", ".jinja")
"""Ends of the names of files that are configuration or tokenizer."""
_REMEDY = "delete the folder, and run 'isthmus join' again with the same invite: it fetches the files anew"
_WEIGHTS = ("model.safetensors.index.json", "adapter_config.json", PORTION)


def write_portion(path: str, cut: Cut, folder: Path) -> str:
    """Write what a silo needs of a model to a folder, which is made.

    Args:
        path: the model folder, or a model id of the hub.
        cut: the silo's.

    Returns:
        The model's fingerprint.

    Raises:
        ModelError: the model folder is incomplete or damaged.
        CutError: the cut does not fit the model.
    """
    from isthmus.model.checkpoint import Checkpoint
    from isthmus.model.cut import load_part

    source = Checkpoint(path)
    bottom = load_part(source, cut, "bottom")
    load_part(source, cut, "top", tied=bottom)
    tensors: dict[str, Any] = {}
    for name in sorted(source.tensors_read):
        with safe_open(source.files[name], "pt") as file:
            tensors[name] = file.get_tensor(name)
    folder.mkdir(parents=True)
    for file in sorted(source.folder.iterdir()):
        if file.suffix in FILE_KINDS and file.name not in _WEIGHTS and file.is_file():
            shutil.copyfile(file, folder / file.name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    digests, metadata = source.digests
    portion = {"digests": digests, "metadata": metadata}
    (folder / PORTION).write_text(json.dumps(portion), encoding="utf-8")
    return source.fingerprint


def whole_digests(folder: Path, found: Mapping[str, str]) -> tuple[dict[str, str], list[str]] | None:
    """Digests of all tensors of the model that this folder holds a portion of, by name, and of its files' metadata.

    Args:
        found: digests of the tensors that are in the folder.

    Returns:
        None: the folder is no portion.

    Raises:
        ModelError: a tensor is not the model's, or the list is damaged.
    """
    file = folder / PORTION
    if not file.exists():
        return None
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        digests = {str(name): str(digest) for name, digest in read["digests"].items()}
        metadata = [str(one) for one in read["metadata"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is damaged", remedy=_REMEDY) from error
    if other := next((name for name, digest in found.items() if digests.get(name) != digest), None):
        raise ModelError(f"{other} in {folder} is not the model's: it was damaged or replaced", remedy=_REMEDY)
    return digests, metadata


def lacking(folder: Path) -> str:
    """A note on what a portion holds; empty if the folder is none."""
    if not (folder / PORTION).exists():
        return ""
    return ": it holds the blocks that this silo keeps, and no others"
