"""The cut: which blocks belong to whom, and parts that hold their own tensors and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from isthmus.errors import CutError, ModelError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, empty_part, load_part, part_of_blocks
from isthmus.model.families import FAMILIES, Family
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


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("stored", ["embedding alone", "head alone", "both alike", "head apart", "alike in 16 bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_is_what_transformers_makes_of_it(tmp_path: Path, stored: str, dtype: torch.dtype) -> None:
    folder = save_tiny_model("llama", tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    if stored == "head alone":
        tensors[HEAD] = tensors.pop(EMBEDDING)
    elif stored != "embedding alone":
        apart = {"both alike": 0.0, "head apart": 1.0, "alike in 16 bits": 1e-9}[stored]
        tensors[HEAD] = tensors[EMBEDDING] + apart
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    checkpoint = Checkpoint(str(folder))
    bottom = load_part(checkpoint, CUT, "bottom", dtype=dtype)
    top = load_part(checkpoint, CUT, "top", dtype=dtype, tied=bottom)
    alone = load_part(checkpoint, CUT, "top", dtype=dtype)
    assert torch.equal(bottom.model.get_parameter(EMBEDDING), whole.get_parameter(EMBEDDING))
    for one in (top, alone):
        assert torch.equal(one.model.get_parameter(HEAD), whole.lm_head.weight)
    ties = whole.lm_head.weight is whole.model.embed_tokens.weight
    assert (top.model.get_parameter(HEAD) is bottom.model.get_parameter(EMBEDDING)) is ties


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


@pytest.mark.parametrize(("family", "wide"), [("gpt_oss", "layernorm.weight"), ("deepseek_v3", "correction_bias")])
def test_tensors_that_a_family_keeps_wide_stay_fp32(family: str, wide: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(str(save_tiny_model(family, tmp_path)))
    whole = uncut(tmp_path, torch.float16).state_dict()
    part = load_part(checkpoint, CUT, "trunk", dtype=torch.float16)
    found = {name: tensor.dtype for name, tensor in part.model.state_dict().items()}
    assert found == {name: whole[part.uncut_name(name)].dtype for name in found}
    assert {dtype for name, dtype in found.items() if name.endswith(wide)} == {torch.float32}


def test_a_base_models_dropout_is_off_and_said(tmp_path: Path) -> None:
    checkpoint = Checkpoint(str(save_tiny_model("phi", tmp_path, resid_pdrop=0.1, attention_dropout=0.2)))
    with pytest.warns(UserWarning, match=r"resid_pdrop = 0.1.* is off in all parts, in training too"):
        part = load_part(checkpoint, CUT, "trunk")
    assert {one.p for one in part.model.modules() if isinstance(one, torch.nn.Dropout)} == {0.0}
    assert part.config.attention_dropout == 0.0
    assert part.whole.resid_pdrop == 0.1


def test_blocks_are_the_uncut_models_and_share_the_parts_configuration() -> None:
    part = empty_part(tiny_config("smollm3"), CUT, "trunk")
    blocks = [block.self_attn for block in part.model.model.layers]
    assert [block.layer_idx for block in blocks] == [0, 1]
    assert [block.use_rope for block in blocks] == [1, 0]
    assert all(block.config is part.config for block in blocks)


def test_a_part_with_repeated_blocks_has_separate_copies() -> None:
    part = part_of_blocks(tiny_config("llama"), "trunk", [1, 1])
    first, second = part.model.model.layers
    assert first is not second
    assert first.self_attn.q_proj.weight is not second.self_attn.q_proj.weight


def test_a_backbone_that_changes_its_input_is_refused_outside_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(str(save_tiny_model("granite", tmp_path)))
    monkeypatch.setitem(FAMILIES, "granite", Family())
    load_part(checkpoint, CUT, "bottom")
    with pytest.raises(ModelError, match="changes hidden states before its first block"):
        load_part(checkpoint, CUT, "top")
