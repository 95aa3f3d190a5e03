"""Model folders: what is wrong with one is named, and each part reads its own tensors and no others."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.errors import CutError, ModelError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, PartName, load_part
from tests.conftest import BLOCKS, save_tiny_model, uncut
from tests.oracle.twins import FAMILIES

PARTS: tuple[PartName, ...] = ("bottom", "trunk", "top")
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def shard(folder: Path) -> Path:
    """Spread the folder's weights over three files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def use(folder: Path | str) -> None:
    """Everything a role does with a folder."""
    checkpoint = Checkpoint(str(folder))
    _ = checkpoint.fingerprint
    for name in PARTS:
        load_part(checkpoint, Cut(1, 2), name)


def refused(folder: Path | str, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint) as caught:
        use(folder)
    assert str(folder) in caught.value.message
    assert caught.value.remedy


def test_a_whole_folder_is_used(folder: Path) -> None:
    use(folder)
    use(shard(folder))


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "nowhere", "a/b/c"])
def test_no_folder(path: str) -> None:
    refused(path, "does not exist")


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_no_usable_config(folder: Path, content: str | None) -> None:
    path = folder / "config.json"
    path.unlink() if content is None else path.write_text(content)
    refused(folder, r"no usable config\.json")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "no readable weights")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_damaged_weights(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, r"cannot read .*model\.safetensors")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"weight_map": []}', "\x00"])
def test_a_damaged_index(folder: Path, content: str) -> None:
    (shard(folder) / INDEX).write_text(content)
    refused(folder, INDEX)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_shard_that_the_index_names(folder: Path, damage: str) -> None:
    path = shard(folder) / "model-1.safetensors"
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:200])
    refused(folder, r"cannot read .*model-1\.safetensors")


def test_swapped_shards(folder: Path) -> None:
    shard(folder)
    first, second = (folder / f"model-{number}.safetensors" for number in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    refused(folder, r"cannot read .*: it lacks .*, which model\.safetensors\.index\.json lists")


def test_a_shard_of_another_model(folder: Path, tmp_path: Path) -> None:
    before = Checkpoint(str(shard(folder))).fingerprint
    other = shard(save_tiny_model("llama", tmp_path / "other", seed=1, tie_word_embeddings=False))
    shutil.copy(other / "model-2.safetensors", folder)
    assert Checkpoint(str(folder)).fingerprint != before


def test_a_tensor_in_two_shards(folder: Path) -> None:
    shard(folder)
    files = [folder / f"model-{number}.safetensors" for number in (0, 1)]
    first, second = (load_file(file) for file in files)
    save_file(second | {min(first): first[min(first)]}, files[1])
    refused(folder, "both hold")


def test_an_index_beside_a_single_file_is_ignored_as_in_transformers(folder: Path) -> None:
    (folder / INDEX).write_text("{")
    use(folder)
    uncut(folder)


def test_a_download_that_did_not_finish(folder: Path) -> None:
    (shard(folder) / "model-1.safetensors").rename(folder / "model-1.safetensors.incomplete")
    refused(folder, r"no such file \(an unfinished download is there: model-1\.safetensors\.incomplete\)")
    for path in folder.glob("model*"):
        path.unlink()
    hidden = folder / ".cache" / "huggingface" / "download"
    hidden.mkdir(parents=True)
    (hidden / "a.incomplete").touch()
    refused(folder, r"no readable weights in .*unfinished download is there: a\.incomplete")


@pytest.mark.parametrize("name", ["model.safetensors", "model-1.safetensors"])
def test_a_pointer_of_git_lfs(folder: Path, name: str) -> None:
    if name != "model.safetensors":
        shard(folder)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    refused(folder, f"cannot read .*{name}: .*git lfs pull")


@pytest.mark.parametrize(
    ("file", "told", "remedy"),
    [
        ("model-Q4_K_M.gguf", "model-Q4_K_M.gguf alone", "gguf_file='model-Q4_K_M.gguf'"),
        ("adapter_config.json", "an adapter alone", "base model"),
        ("pytorch_model.bin", "pytorch_model.bin alone", "save_pretrained"),
        ("tokenizer.model", "neither", "model.safetensors"),
    ],
)
def test_folders_of_another_kind(folder: Path, file: str, told: str, remedy: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / file).touch()
    with pytest.raises(ModelError, match=told) as caught:
        use(folder)
    assert remedy in caught.value.remedy
    assert str(folder) in caught.value.message


def test_folders_from_which_transformers_loads_other_weights(folder: Path) -> None:
    configure(folder, transformers_weights="other.safetensors")
    refused(folder, r"names other\.safetensors as its weights")
    configure(folder, transformers_weights=None)
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, r"holds adapter_config\.json beside the weights")


def test_a_file_that_changes_while_it_is_in_use(folder: Path) -> None:
    checkpoint = Checkpoint(str(folder))
    load_part(checkpoint, Cut(1, 2), "bottom")
    rewrite(folder, lambda tensors: tensors[EMBEDDING].add_(1))
    with pytest.raises(ModelError, match=r"model\.safetensors was changed while it was in use"):
        load_part(checkpoint, Cut(1, 2), "trunk")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "bfloat16", 7, None])
def test_the_configs_own_dtype_is_only_a_hint(folder: Path, original: Path, dtype: object) -> None:
    configure(folder, dtype="nonsense")
    refused(folder, r"no usable config\.json .*nonsense")
    configure(folder, dtype=dtype)
    use(folder)
    assert Checkpoint(str(folder)).fingerprint == Checkpoint(str(original)).fingerprint


@pytest.mark.parametrize(
    ("name", "refused_by"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "bottom"),
        ("model.layers.2.mlp.up_proj.weight_scale", "trunk"),
        ("model.layers.4.self_attn.q_proj.g_idx", "top"),
        ("lm_head.bias", "top"),
        ("model.norm.bias", "top"),
        ("model.embed_tokens.weight_scale", "bottom"),
        ("model.layers.1.self_attn.rotary_emb.inv_freq", ""),
        ("model.layers.5.mlp.up_proj.weight", ""),
        ("score.weight", ""),
        ("vision_tower.weight", ""),
    ],
)
def test_tensors_that_no_part_takes(folder: Path, name: str, refused_by: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(3)}))
    for part in PARTS:
        if part == refused_by:
            with pytest.raises(ModelError, match=f"holds {name}, which a llama model does not use") as caught:
                load_part(Checkpoint(str(folder)), Cut(1, 2), part)
            assert str(folder) in caught.value.message
        else:
            load_part(Checkpoint(str(folder)), Cut(1, 2), part)


def test_a_tensor_that_the_shard_lacks(folder: Path) -> None:
    path = shard(folder) / "model-1.safetensors"
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)
    refused(folder, r"cannot read .*model-1\.safetensors")
    with pytest.raises(ModelError):
        Checkpoint(str(folder)).read(list(Checkpoint(str(folder)).files))


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", EMBEDDING])
def test_a_missing_tensor(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.pop(name))
    refused(folder, f"lacks the tensor {name}")


def test_a_tensor_of_another_shape_than_the_config_says(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({EMBEDDING: torch.ones(50, 32)}))
    refused(folder, f"{EMBEDDING} .*shape")


@pytest.mark.parametrize("model_type", ["gpt2", "no-such-type"])
def test_a_model_type_that_cannot_be_cut(folder: Path, model_type: str) -> None:
    configure(folder, model_type=model_type)
    with pytest.raises(ModelError, match=r"gpt2|no usable config\.json") as caught:
        load_part(Checkpoint(str(folder)), Cut(1, 1), "bottom")
    assert caught.value.remedy


@pytest.mark.parametrize("cut", [(0, 1), (1, 0), (-1, 2), (2, 3), (4, 1), (9, 9), (5, 1)])
@pytest.mark.parametrize("name", PARTS)
def test_a_cut_that_does_not_fit(original: Path, cut: tuple[int, int], name: PartName) -> None:
    with pytest.raises(CutError, match=f"does not fit a model of {BLOCKS} blocks") as caught:
        load_part(Checkpoint(str(original)), Cut(*cut), name)
    assert f"at most {BLOCKS - 1}" in caught.value.remedy


def test_sharded_equals_single(original: Path, folder: Path) -> None:
    single, sharded = Checkpoint(str(original)), Checkpoint(str(shard(folder)))
    assert single.files.keys() == sharded.files.keys()
    assert len(set(sharded.files.values())) == 3
    names = sorted(single.files)
    for name, other in zip(single.read(names).items(), sharded.read(names).items(), strict=True):
        assert name[0] == other[0]
        assert torch.equal(name[1], other[1])
    assert single.fingerprint == sharded.fingerprint


def test_fingerprint_differs_with_any_tensor(original: Path, folder: Path) -> None:
    before = Checkpoint(str(original)).fingerprint
    assert Checkpoint(str(folder)).fingerprint == before
    seen = {before}
    for name in sorted(Checkpoint(str(original)).files):
        rewrite(folder, lambda tensors, name=name: tensors[name].mul_(1.01))
        seen.add(Checkpoint(str(folder)).fingerprint)
        shutil.copy(original / "model.safetensors", folder)
    assert len(seen) == 1 + len(Checkpoint(str(original)).files)
    assert Checkpoint(str(folder)).fingerprint == before


@pytest.mark.parametrize(
    ("values", "same"),
    [({"rms_norm_eps": 1e-3}, False), ({"hidden_act": "gelu"}, False), ({"transformers_version": "5.0.0"}, True)],
)
def test_fingerprint_differs_with_what_the_config_computes(
    original: Path, folder: Path, values: dict[str, object], same: bool
) -> None:
    configure(folder, **values)
    assert (Checkpoint(str(folder)).fingerprint == Checkpoint(str(original)).fingerprint) is same


def test_fingerprint_gives_no_tensor_to_anybody(original: Path) -> None:
    checkpoint = Checkpoint(str(original))
    assert len(checkpoint.fingerprint) == 64
    assert checkpoint.tensors_read == set()


def test_200_damaged_bytes_of_200_are_noticed(folder: Path) -> None:
    before, rng = Checkpoint(str(folder)).fingerprint, random.Random(0)

    def damage(path: Path, times: int) -> None:
        content = path.read_bytes()
        for _ in range(times):
            place = rng.randrange(len(content))
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
            with suppress(ModelError):
                assert Checkpoint(str(folder)).fingerprint != before, place
        path.write_bytes(content)

    damage(folder / "model.safetensors", 100)
    shard(folder)
    for number in range(3):
        damage(folder / f"model-{number}.safetensors", 34)
    assert Checkpoint(str(folder)).fingerprint == before


def read_by(folder: Path, name: PartName, cut: Cut) -> set[str]:
    checkpoint = Checkpoint(str(folder))
    tied = load_part(Checkpoint(str(folder)), cut, "bottom") if name == "top" else None
    load_part(checkpoint, cut, name, tied=tied)
    return checkpoint.tensors_read


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_part_reads_its_own_tensors_only(family: str, tie: bool, tmp_path: Path) -> None:
    folder, cut = save_tiny_model(family, tmp_path, tie_word_embeddings=tie), Cut(1, 2)
    read = {name: read_by(folder, name, cut) for name in PARTS}
    stored = {name: tensor.nbytes for name, tensor in load_file(folder / "model.safetensors").items()}
    assert set.union(*read.values()) == set(stored)
    assert sum(map(len, read.values())) == len(stored), "two parts read the same tensor"
    for name, names in read.items():
        blocks = {int(one.split(".")[2]) for one in names if one.startswith("model.layers.")}
        assert blocks == set(cut.blocks(name, BLOCKS))
    size = {name: sum(stored[one] for one in names) for name, names in read.items()}
    assert sum(size.values()) == sum(stored.values()) < (folder / "model.safetensors").stat().st_size
    blocks_alone = {name: sum(stored[one] for one in names if ".layers." in one) for name, names in read.items()}
    assert blocks_alone["trunk"] == size["trunk"] == blocks_alone["top"] == 2 * blocks_alone["bottom"]


def test_a_top_alone_reads_the_tied_embedding_as_its_head(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path, tie_word_embeddings=True)
    checkpoint = Checkpoint(str(folder))
    top = load_part(checkpoint, Cut(1, 1), "top")
    assert EMBEDDING in checkpoint.tensors_read
    assert torch.equal(top.model.lm_head.weight, uncut(folder).lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_hold_the_checkpoints_values_in_the_dtype_asked_for(original: Path, dtype: torch.dtype) -> None:
    whole = uncut(original).state_dict()
    for name in PARTS:
        part = load_part(Checkpoint(str(original)), Cut(2, 1), name, dtype=dtype)
        for own, parameter in part.model.named_parameters():
            assert torch.equal(parameter, whole[part.uncut_name(own)].to(dtype))
            assert not parameter.requires_grad
