"""A model of 32 blocks that computes what SmolLM2-135M does, and its parts in the form that FedSEA-LLaMA loads.

The other code takes 32 blocks for granted; SmolLM2 has 30. Two more stand in its middle whose output matrices are
zero, so that they add nothing to the hidden states, and cost what any block costs.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

BLOCKS, LONGEST = 32, 4096
"""Blocks, and the longest sequence: both are written into the other code."""
MIDDLE, ADDED = 15, 2
KEPT = 5
"""Blocks that the files of both ends hold; it loads the first or last few of them."""
NUMBER = re.compile(r"(?<=layers\.)\d+")


def deepen(source: Path, target: Path) -> Path:
    """The folder of SmolLM2 with two blocks more, made on the first call."""
    if not (target / "model.safetensors").exists():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        config = json.loads((source / "config.json").read_text())
        config |= {"num_hidden_layers": BLOCKS, "max_position_embeddings": LONGEST}
        (target / "config.json").write_text(json.dumps(config, indent=1))
        tensors: Tensors = {}
        for name, tensor in load_file(source / "model.safetensors").items():
            block = block_of(name)
            if block is None:
                tensors[name] = tensor
                continue
            tensors[moved(name, ADDED if block >= MIDDLE else 0)] = tensor
            if block == MIDDLE - 1:
                silent = name.endswith(("o_proj.weight", "down_proj.weight"))
                for number in range(1, ADDED + 1):
                    tensors[moved(name, number)] = torch.zeros_like(tensor) if silent else tensor.clone()
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def divide(model: Path, target: Path) -> None:
    """Write the parts of the model, each with its configuration, as the other code's own splitting program names them.

    Args:
        model: folder of a model of 32 blocks.
        target: folder that the programs are started in.
    """
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    parts: dict[str, tuple[str, Tensors]] = {
        "clientA": ("A", {"model.embed_tokens.weight": embedding} | blocks(tensors, range(KEPT))),
        "server": ("B", blocks(tensors, range(1, BLOCKS - 1))),
        "clientC": (
            "C",
            blocks(tensors, range(BLOCKS - KEPT, BLOCKS))
            | {"model.norm.weight": tensors["model.norm.weight"], "lm_head.weight": embedding},
        ),
    }
    for folder, (letter, part) in parts.items():
        (target / folder).mkdir(parents=True, exist_ok=True)
        torch.save(part, target / folder / f"pytorch_model_{letter}.bin")
        (target / folder / "config.json").write_text(json.dumps(older_config(model), indent=1))
        adapters = target / "Lora_weights" / "lora_r16_alpha32_weights" / f"lora_{letter}"
        adapters.mkdir(parents=True, exist_ok=True)
        torch.save({}, adapters / "adapter_model.bin")  # none: adapters begin as PEFT makes them, B at zero
    write_tokenizer(model, target / "Centralized_Models" / "model_path")


def write_tokenizer(model: Path, target: Path) -> None:
    """Write the model's tokenizer as an older transformers reads it: merges as text, and a class that it knows."""
    target.mkdir(parents=True, exist_ok=True)
    content = json.loads((model / "tokenizer.json").read_text())
    inner = content.get("model", {})
    inner["merges"] = [one if isinstance(one, str) else " ".join(one) for one in inner.get("merges", [])]
    (target / "tokenizer.json").write_text(json.dumps(content | {"model": inner}))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names))
    (target / "config.json").write_text(json.dumps(older_config(model), indent=1))


def older_config(model: Path) -> dict[str, object]:
    """The model's configuration, as an older transformers and the other code's parts read it."""
    config = json.loads((model / "config.json").read_text())
    rope = config.pop("rope_parameters")
    own = {"num_clients_layers": 1, "tie_word_embeddings": False, "torch_dtype": "float32"}
    return config | {"rope_theta": rope["rope_theta"]} | own


def blocks(tensors: Tensors, chosen: Iterable[int]) -> Tensors:
    """The tensors of these blocks, numbered from 0."""
    numbers = {block: number for number, block in enumerate(chosen)}
    own = {name: block_of(name) for name in tensors}
    return {
        moved(name, numbers[block] - block): tensors[name]
        for name, block in own.items()
        if block is not None and block in numbers
    }


def block_of(name: str) -> int | None:
    """Number of the block that a tensor belongs to; None: to none."""
    found = NUMBER.search(name)
    return None if found is None else int(found[0])


def moved(name: str, blocks: int) -> str:
    """A tensor's name in a block that stands so many further on."""
    return NUMBER.sub(lambda found: str(int(found[0]) + blocks), name)
