"""A silo's portion of a model: its ends equal the whole model's, with the whole model's fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.errors import ModelError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, load_part
from isthmus.model.families import FAMILIES
from isthmus.model.portion import PORTION, write_portion
from tests.conftest import save_tiny_model

KINDS = ["llama", "gemma2", "qwen3_moe", "phi3", "gpt_oss", "olmo2"]


@pytest.mark.parametrize("family", [one for one in KINDS if one in FAMILIES])
@pytest.mark.parametrize("tied", [False, True])
def test_the_ends_of_a_portion_are_those_of_the_whole(family: str, tied: bool, tmp_path: Path) -> None:
    whole = save_tiny_model(family, tmp_path / "model", tie_word_embeddings=tied)
    cut = Cut(2, 1)
    fingerprint = write_portion(str(whole), cut, tmp_path / "own")
    own = Checkpoint(str(tmp_path / "own"))
    assert own.fingerprint == fingerprint == Checkpoint(str(whole)).fingerprint
    bottom = load_part(own, cut, "bottom")
    parts = {"bottom": bottom, "top": load_part(own, cut, "top", tied=bottom)}
    for name, part in parts.items():
        expected = load_part(Checkpoint(str(whole)), cut, name).model.state_dict()  # type: ignore[arg-type]
        found = part.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(one, expected[key]) for key, one in found.items())
    size = (tmp_path / "own" / "model.safetensors").stat().st_size
    assert size < (whole / "model.safetensors").stat().st_size


def test_a_portion_has_no_trunk(tmp_path: Path) -> None:
    whole = save_tiny_model("llama", tmp_path / "model")
    write_portion(str(whole), Cut(1, 1), tmp_path / "own")
    with pytest.raises(ModelError, match="the blocks that this silo keeps, and no others"):
        load_part(Checkpoint(str(tmp_path / "own")), Cut(1, 1), "trunk")
    with pytest.raises(ModelError, match="and no others"):
        load_part(Checkpoint(str(tmp_path / "own")), Cut(2, 1), "bottom")


def test_a_sharded_model_gives_the_same_portion(tmp_path: Path) -> None:
    whole = save_tiny_model("llama", tmp_path / "model")
    tensors = load_file(whole / "model.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    for file in whole.iterdir():
        if file.name != "model.safetensors":
            (shards / file.name).write_bytes(file.read_bytes())
    places = {}
    for number, name in enumerate(sorted(tensors)):
        places[name] = f"model-{number % 3}.safetensors"
    for place in set(places.values()):
        save_file({name: one for name, one in tensors.items() if places[name] == place}, shards / place)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert write_portion(str(shards), Cut(1, 1), tmp_path / "a") == write_portion(str(whole), Cut(1, 1), tmp_path / "b")
    assert (
        load_file(tmp_path / "a" / "model.safetensors").keys() == load_file(tmp_path / "b" / "model.safetensors").keys()
    )
    assert not (tmp_path / "a" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("how", ["weights", "digests", "list"])
def test_a_portion_that_was_changed_is_refused_or_another_model(how: str, tmp_path: Path) -> None:
    whole = save_tiny_model("llama", tmp_path / "model")
    own = tmp_path / "own"
    fingerprint = write_portion(str(whole), Cut(1, 1), own)
    if how == "weights":
        tensors = load_file(own / "model.safetensors")
        name = next(iter(tensors))
        save_file(tensors | {name: tensors[name] + 1}, own / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=name.replace(".", r"\.")):
            _ = Checkpoint(str(own)).fingerprint
    elif how == "list":
        for text in ("{", "{}", "[]", '{"digests": 3, "metadata": []}'):
            (own / PORTION).write_text(text)
            with pytest.raises(ModelError, match=f"{PORTION} is damaged"):
                _ = Checkpoint(str(own)).fingerprint
    else:
        read = json.loads((own / PORTION).read_text())
        absent = sorted(read["digests"].keys() - load_file(own / "model.safetensors").keys())[0]
        read["digests"][absent] = "0" * 64
        (own / PORTION).write_text(json.dumps(read))
        assert Checkpoint(str(own)).fingerprint != fingerprint
