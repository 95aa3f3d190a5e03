"""The cut: which blocks belong to whom, and parts that hold their own tensors and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.errors import CutError, ModelError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, empty_part, load_part
from tests.conftest import BLOCKS, save_tiny_model, tiny_config, uncut

CUT = Cut(1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def test_blocks_are_shared_out_without_rest() -> None:
    parts = [list(CUT.blocks(name, BLOCKS)) for name in ("bottom", "trunk", "top")]  # type: ignore[arg-type]
    assert parts == [[0], [1, 2], [3, 4]]


@pytest.mark.parametrize("cut", [Cut(0, 1), Cut(1, 0), Cut(4, 1), Cut(9, 9)], ids=str)
def test_a_cut_that_leaves_a_part_without_blocks_is_refused(cut: Cut) -> None:
    with pytest.raises(CutError, match="does not fit a model of 5 blocks"):
        cut.blocks("trunk", BLOCKS)


def test_each_part_has_its_own_tensors_under_its_own_numbers(folder: Path) -> None:
    whole = dict(uncut(folder).named_parameters())
    seen: list[str] = []
    for name in ("bottom", "trunk", "top"):
        part = load_part(Checkpoint(str(folder)), CUT, name)  # type: ignore[arg-type]
        named = {part.uncut_name(key): tensor for key, tensor in part.model.named_parameters()}
        assert all(torch.equal(tensor, whole[key]) for key, tensor in named.items())
        assert not any(tensor.requires_grad for tensor in named.values())
        seen += named
    assert sorted(seen) == sorted(whole)


def test_a_tied_head_is_the_bottoms_embedding(tmp_path: Path) -> None:
    checkpoint = Checkpoint(str(save_tiny_model("llama", tmp_path, tie_word_embeddings=True)))
    bottom = load_part(checkpoint, CUT, "bottom")
    top = load_part(checkpoint, CUT, "top", tied=bottom)
    assert top.model.lm_head.weight is bottom.model.model.embed_tokens.weight


def test_an_empty_part_takes_no_memory_and_knows_its_layers() -> None:
    config = tiny_config("gemma2")
    part = empty_part(config, CUT, "trunk")
    assert {tensor.device.type for tensor in part.model.parameters()} == {"meta"}
    assert part.config.layer_types == config.layer_types[1:3]
    assert part.uncut_name("model.layers.0.mlp") == "model.layers.1.mlp"
    assert part.uncut_name("lm_head.weight") == "lm_head.weight"


def test_a_tensor_of_another_shape_is_named(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(str(folder))
    checkpoint.config.intermediate_size = 64
    with pytest.raises(ModelError, match="mlp"):
        load_part(checkpoint, CUT, "trunk")
