"""A distilled draft on the silo's disk: the bridge's weights and the silo's recorded answers, as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from isthmus.errors import ModelError
from isthmus.model.split import SplitForCausalLM
from isthmus.silo.drafting.bridge import Bridge
from isthmus.silo.drafting.draft import Corpus, Draft
from isthmus.storage.record import writing

NAME = "draft.safetensors"
"""The file's name in the silo's folder of a run."""
BRIDGE, WORDS, TEXTS, SIZES = "bridge.", "words", "texts", "sizes"
_REMEDY = "distil it again with 'isthmus draft'"


def save(path: Path, draft: Draft, corpus: Corpus) -> None:
    """Write a draft and the texts behind its look-ups, whole or not at all.

    Raises:
        RunError: the disk is full or the place cannot be written.
    """
    assert isinstance(draft.trunk, Bridge)
    tensors = {BRIDGE + name: tensor.contiguous() for name, tensor in draft.trunk.state_dict().items()}
    tensors[WORDS] = draft.words
    tensors[TEXTS] = torch.tensor([token for ids, _ in corpus for token in ids], dtype=torch.int64)
    tensors[SIZES] = torch.tensor([[len(ids), start] for ids, start in corpus], dtype=torch.int64).reshape(-1, 2)
    with writing(path) as temporary:
        save_file(tensors, temporary, metadata={"blocks": str(draft.trunk.blocks)})


def load(path: Path, model: SplitForCausalLM) -> Draft:
    """The draft model for a split model, from a file that ``save`` wrote.

    Raises:
        ModelError: the file is damaged, or belongs to another model or cut.
    """
    try:
        with safe_open(path, "pt") as file:
            blocks = int((file.metadata() or {})["blocks"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        words, sizes = tensors.pop(WORDS), tensors.pop(SIZES).tolist()
        texts = tensors.pop(TEXTS).split([length for length, _ in sizes])
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise ModelError(f"no usable draft in {path}: {error}", remedy=_REMEDY) from error
    bridge = Bridge(model.bottom, blocks)
    weights = {name.removeprefix(BRIDGE): tensor for name, tensor in tensors.items()}
    try:
        bridge.load_state_dict(weights)
        outside = bool((words < 0).any() or (words >= model.config.vocab_size).any())
    except RuntimeError as error:
        raise ModelError(f"the draft in {path} belongs to another model", remedy=_REMEDY) from error
    if outside or not len(words):
        raise ModelError(f"the draft in {path} uses tokens that the model lacks", remedy=_REMEDY)
    corpus = [(ids.tolist(), start) for ids, (_, start) in zip(texts, sizes, strict=True)]
    return Draft(model, bridge.to(model.device), words.to(model.device), corpus)
