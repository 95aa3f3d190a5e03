"""Tensors of a folder by their names in the uncut model: renamed, and joined from pieces."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.errors import ModelError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, load_part
from isthmus.model.families import uncut_shapes
from isthmus.model.stored import StoredTensors
from tests.conftest import save_tiny_model, uncut

EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model("mixtral", tmp_path)


def stored(folder: Path) -> StoredTensors:
    checkpoint = Checkpoint(str(folder))
    return StoredTensors(checkpoint, uncut_shapes(checkpoint.config))


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tensor_in_pieces_is_joined_as_transformers_does(folder: Path) -> None:
    tensors = stored(folder)
    assert tensors.sources(EXPERTS) == [
        f"model.layers.1.block_sparse_moe.experts.{expert}.{one}.weight" for expert in range(4) for one in ("w1", "w3")
    ]
    assert torch.equal(tensors.read(EXPERTS), uncut(folder).get_parameter(EXPERTS))


def test_tensors_under_their_own_names_are_their_own_sources(folder: Path) -> None:
    tensors = stored(folder)
    name = "model.layers.2.self_attn.q_proj.weight"
    assert tensors.sources(name) == [name]
    assert name in tensors
    assert "model.layers.9.mlp" not in tensors
    with pytest.raises(ModelError, match=r"lacks the tensor model\.layers\.9\.mlp"):
        tensors.read("model.layers.9.mlp")


@pytest.mark.parametrize("gone", ["experts.3.w1", "experts.2.w2"])
def test_a_missing_piece_is_an_error(folder: Path, gone: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, {name: one for name, one in tensors.items() if gone not in name})
    with pytest.raises(ModelError, match=r"do not fit together|has shape"):
        load_part(Checkpoint(str(folder)), Cut(1, 1), "trunk")


def test_a_part_reads_its_own_experts_only(folder: Path) -> None:
    checkpoint = Checkpoint(str(folder))
    load_part(checkpoint, Cut(1, 1), "trunk")
    blocks = {name.split(".")[2] for name in checkpoint.tensors_read}
    assert blocks == {"1", "2", "3"}


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_multimodal_folder_is_read_under_its_old_and_new_names(tmp_path: Path, prefix: str) -> None:
    folder = save_tiny_model("gemma3", tmp_path)
    whole = copy.deepcopy(uncut(folder))
    tensors = {name: one.clone() for name, one in whole.state_dict().items() if name != "lm_head.weight"}
    rewrite(folder, {name.replace("model.language_model.", prefix): one for name, one in tensors.items()})
    part = load_part(Checkpoint(str(folder)), Cut(1, 1), "trunk")
    for name, parameter in part.model.named_parameters():
        assert part.uncut_name(name).startswith("model.language_model.layers.")
        assert torch.equal(parameter, whole.get_parameter(part.uncut_name(name)))


def test_a_text_model_is_read_from_a_multimodal_folder(tmp_path: Path) -> None:
    """llama4 as it is published: transformers' causal language model is its text part under names of its own."""
    folder = save_tiny_model("llama4", tmp_path)
    whole = copy.deepcopy(uncut(folder))
    images = {"vision_model.class_embedding": torch.zeros(16)}
    rewrite(folder, images | {f"language_model.{name}": one.clone() for name, one in whole.state_dict().items()})
    for name in ("bottom", "trunk", "top"):
        part = load_part(Checkpoint(str(folder)), Cut(1, 1), name)  # type: ignore[arg-type]
        for own, parameter in part.model.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(part.uncut_name(own)))


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model("gemma3", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layers.2.self_attn.q_proj" in name and "vision" not in name)
    old = name.replace("model.language_model.", "language_model.model.")
    new = name.replace("language_model.model.", "model.language_model.")
    rewrite(folder, tensors | {old: tensors[name], new: tensors[name].clone()})
    with pytest.raises(ModelError, match="twice, as"):
        load_part(Checkpoint(str(folder)), Cut(1, 1), "trunk")
