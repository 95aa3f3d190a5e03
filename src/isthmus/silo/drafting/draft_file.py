"""The file of a distilled draft model: the bridge's weights and the silo's recorded answers, as safetensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from isthmus.errors import ModelError
from isthmus.model.split import SplitForCausalLM
from isthmus.silo.drafting.bridge import Bridge
from isthmus.silo.drafting.draft import Corpus, Draft
from isthmus.storage.files import writing

DRAFT_FILE = "draft.safetensors"
"""The file's name in the silo's folder of a run."""
BRIDGE, WORDS, TEXTS, SIZES = "bridge.", "words", "texts", "sizes"
"""Names in the file: prefix of the bridge's tensors, draft vocabulary, texts, and length and start of each text."""
_REMEDY = "distil it again with 'isthmus draft'"


def save(path: Path, draft: Draft, corpus: Corpus) -> None:
    """Write a draft model and the texts of its look-up. An existing file is replaced as a whole.

    Raises:
        DiskFullError: the disk is full.
        RunError: the file cannot be written.
    """
    assert isinstance(draft.trunk, Bridge)
    tensors = {BRIDGE + name: tensor.contiguous() for name, tensor in draft.trunk.state_dict().items()}
    tensors[WORDS] = draft.vocabulary
    tensors[TEXTS] = torch.tensor([token for ids, _ in corpus for token in ids], dtype=torch.int64)
    tensors[SIZES] = torch.tensor([[len(ids), start] for ids, start in corpus], dtype=torch.int64).reshape(-1, 2)
    with writing(path) as temporary:
        save_file(
            tensors,
            temporary,
            metadata={"blocks": str(draft.trunk.blocks), "digest": _digest(draft.trunk.blocks, tensors)},
        )


def load(path: Path, model: SplitForCausalLM) -> Draft:
    """The draft model for a split model, from a file that ``save`` wrote.

    Raises:
        ModelError: the file is damaged, or is of another model or cut.
    """
    try:
        with safe_open(path, "pt") as file:
            blocks = int((file.metadata() or {})["blocks"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if _digest(blocks, tensors) != (file.metadata() or {})["digest"]:
                raise ValueError("its checksum does not match: it is damaged")
        vocabulary, sizes = tensors.pop(WORDS), tensors.pop(SIZES).tolist()
        texts = tensors.pop(TEXTS).split([length for length, _ in sizes])
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise ModelError(f"no usable draft in {path}: {error}", remedy=_REMEDY) from error
    bridge = Bridge(model.bottom, blocks)
    weights = {name.removeprefix(BRIDGE): tensor for name, tensor in tensors.items()}
    try:
        bridge.load_state_dict(weights)
        outside = bool((vocabulary < 0).any() or (vocabulary >= model.config.vocab_size).any())
    except RuntimeError as error:
        raise ModelError(f"the draft in {path} belongs to another model", remedy=_REMEDY) from error
    if outside or not len(vocabulary):
        raise ModelError(f"the draft in {path} uses tokens outside the model's vocabulary", remedy=_REMEDY)
    corpus = [(ids.tolist(), start) for ids, (_, start) in zip(texts, sizes, strict=True)]
    return Draft(model, bridge.to(model.device), vocabulary.to(model.device), corpus)


def _digest(blocks: int, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of everything in the file."""
    digest = hashlib.sha256(str(blocks).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
